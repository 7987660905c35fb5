"""Draws how an answer was decoded: a picture (position across, round down), and an animation in which it is filled in.

    python tools/visualize_decode.py --checkpoint runs/tiny --out decode.png
    python tools/visualize_decode.py --checkpoint runs/tiny --prompt "..." --out decode.png --slot-size 4

The animation lies beside the picture (decode.gif), one frame per forward pass. Without --prompt: of the run's first 8
held-out examples the one that takes most rounds.
"""

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from refusion_jax import compilation, display
from refusion_jax.decoder import Decoder, add_model_arguments, add_sampler_arguments, decoder_of, held_out, settings_of
from refusion_jax.errors import UserError, run_main
from refusion_jax.sampling import Generation, SamplerConfig

# Pixels. Twice the size that is comfortable to read, so that pictures stay sharp on any screen.
TEXT, SMALL, CELL, GAP, MARGIN, WIDTH = 26, 20, 46, 4, 40, 2400
SLOT_GAP, BLOCK_GAP, LABEL = 14, 30, 150
INK, FAINT, PAPER, OPEN, CUT = (28, 30, 36), (134, 140, 150), (255, 255, 255), (238, 240, 243), (222, 222, 226)
RAMP = (
    (62, 106, 225),
    (26, 152, 196),
    (38, 166, 120),
    (132, 178, 46),
    (232, 174, 30),
    (236, 124, 44),
    (214, 62, 74),
)  # first to last round


def shade(round_: int, rounds: int) -> tuple[int, int, int]:
    """The colour of a round."""
    at = round_ / max(1, rounds - 1) * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    return mix(RAMP[low], RAMP[low + 1], at - low)


def mix(a: Sequence[int], b: Sequence[int], part: float) -> tuple[int, int, int]:
    return tuple(round(x + (y - x) * part) for x, y in zip(a, b))


@dataclasses.dataclass(frozen=True)
class Cell:
    """A position of the answer: what stands there in the end, and since when."""

    text: str
    round: int | None  # None: never committed
    cut: bool  # behind the end of the answer: only the slots before it saw it


def cells_of(decoder: Decoder, answer: Generation) -> list[Cell]:
    """One for each position up to the last committed one."""
    eos = decoder.model.eos_token_id
    found = {
        position: (token, round_) for position, token, round_ in zip(answer.order, answer.committed, answer.rounds)
    }
    length = len(answer.tokens)
    texts = display.pieces(decoder.tokenizer, answer.tokens)
    cells = []
    for position in range(max(found, default=-1) + 1):
        token, round_ = found.get(position, (None, None))
        text = "" if token is None else texts[position] if position < length else decoder.tokenizer.decode([token])
        text = "end" if token == eos else text.replace("\n", "\u23ce").replace("\t", "\u21e5")
        cells.append(Cell(text, round_, position >= length))
    return cells


class Painter:
    """Fonts, and where the cells of an answer lie."""

    def __init__(self, cells: Sequence[Cell], sampler: SamplerConfig):
        try:
            import matplotlib
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise UserError(
                f"Pictures need Pillow and matplotlib ({error}); install them with: pip install 'refusion_jax[demo]'."
            ) from None
        fonts = (
            pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        )  # a font with most scripts, wherever this runs
        self._image, self._draw = Image, ImageDraw.Draw
        self.font, self.small = (ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), size) for size in (TEXT, SMALL))
        self.bold = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), TEXT + 4)
        self.plain = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), TEXT)
        self.cells = cells
        self.rounds = max((cell.round for cell in cells if cell.round is not None), default=0) + 1
        self.bands = self._place(sampler)

    def _place(self, sampler: SamplerConfig) -> list[list[tuple[int, int, int]]]:
        """(position, left, right) of every cell, by lines no wider than the picture; a slot stays whole if it fits."""
        k, block = sampler.groups
        k = k or 10
        bands, x = [[]], LABEL
        for start in range(0, len(self.cells), k):
            positions = range(start, min(start + k, len(self.cells)))
            widths = [max(CELL - 10, round(self.font.getlength(self.cells[p].text)) + 14) for p in positions]
            if bands[-1]:
                x += BLOCK_GAP if block and start % block == 0 else SLOT_GAP
                if x + sum(widths) + GAP * len(widths) > WIDTH - MARGIN:
                    bands.append([])
                    x = LABEL
            for position, width in zip(positions, widths):
                if bands[-1] and x + width > WIDTH - MARGIN:  # a slot wider than the picture
                    bands.append([])
                    x = LABEL
                bands[-1].append((position, x, x + width))
                x += width + GAP
        return bands

    def canvas(self, height: int, title: str, subtitle: str) -> tuple[Any, Any]:
        """An image of at least that height with a title, and what draws on it."""
        right = max((right for band in self.bands for *_, right in band), default=0)
        width = min(WIDTH, max(right + MARGIN + 80, 1300))
        image = self._image.new("RGB", (width, height), PAPER)
        draw = self._draw(image)
        draw.text((MARGIN, MARGIN - 8), self._fit(title, self.bold, width - 2 * MARGIN), font=self.bold, fill=INK)
        draw.text((MARGIN, MARGIN + 40), subtitle, font=self.plain, fill=FAINT)
        return image, draw

    @staticmethod
    def _fit(text: str, font: Any, width: int) -> str:
        text = " ".join(text.split())
        if font.getlength(text) <= width:
            return text
        while font.getlength(text + "\u2026") > width:
            text = text[:-1]
        return text + "\u2026"

    def line(
        self, draw: Any, band: Sequence[tuple[int, int, int]], y: int, filled: set[int], accent: int | None = None
    ) -> None:
        """The cells of a band with the `filled` positions; only round `accent` in full colour, unless it is None."""
        for position, left, right in band:
            cell, box = self.cells[position], (left, y, right, y + CELL)
            if position not in filled:
                draw.rounded_rectangle(box, 7, fill=OPEN)
                continue
            strong = accent in (None, cell.round)
            color = CUT if cell.cut else shade(cell.round, self.rounds)
            fill = color if strong else mix(color, PAPER, 0.72)
            ink = FAINT if cell.cut else (PAPER if strong else INK)
            draw.rounded_rectangle(box, 7, fill=fill)
            draw.text(
                ((left + right) / 2, y + CELL / 2),
                cell.text,
                font=self.small if cell.text == "end" else self.font,
                fill=ink,
                anchor="mm",
            )

    def upto(self, round_: int) -> set[int]:
        """Positions that are committed after a round."""
        return {p for p, cell in enumerate(self.cells) if cell.round is not None and cell.round <= round_}

    def picture(self, title: str, subtitle: str) -> Any:
        """Position across, round down; the last line of a band shows all rounds."""
        shown = [sorted({self.cells[p].round for p, *_ in band} - {None}) for band in self.bands]
        row = CELL + 12
        height = 130 + sum(40 + row * len(rounds) + 24 + row + 50 for rounds in shown)
        image, draw = self.canvas(height, title, subtitle)
        y = 130
        for band, rounds in zip(self.bands, shown):
            for position, left, right in band:
                if position % 5 == 0:
                    draw.text(((left + right) / 2, y + 14), str(position), font=self.small, fill=FAINT, anchor="mm")
            y += 40
            for r in rounds:
                draw.text((MARGIN, y + CELL / 2), f"round {r + 1}", font=self.small, fill=INK, anchor="lm")
                filled, before = self.upto(r), self.upto(r - 1)
                self.line(draw, band, y, filled, r)
                if len(self.bands) == 1:
                    draw.text(
                        (band[-1][2] + 16, y + CELL / 2),
                        f"+{len(filled - before)}",
                        font=self.small,
                        fill=shade(r, self.rounds),
                        anchor="lm",
                    )
                y += row
            y += 24
            draw.text((MARGIN, y + CELL / 2), "answer", font=self.small, fill=INK, anchor="lm")
            self.line(draw, band, y, self.upto(self.rounds))
            y += row + 50
        if any(cell.cut for cell in self.cells):
            draw.text(
                (MARGIN, y - 30),
                "grey: behind the end; slots that were still open saw it, the answer does not contain it",
                font=self.small,
                fill=FAINT,
            )
        return image

    def frame(self, title: str, subtitle: str, filled: set[int]) -> Any:
        """The answer with the `filled` positions."""
        row = CELL + 20
        image, draw = self.canvas(130 + row * len(self.bands) + MARGIN, title, subtitle)
        for number, band in enumerate(self.bands):
            draw.text(
                (MARGIN, 130 + row * number + CELL / 2),
                str(band[0][0]) if band else "",
                font=self.small,
                fill=FAINT,
                anchor="lm",
            )
            self.line(draw, band, 130 + row * number, filled)
        return image


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--prompt", help="default: a held-out example of the run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("decode.png"), metavar="FILE.png")
    parser.add_argument("--milliseconds", type=int, default=250, help="of a forward pass in the animation; default 250")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling; default 0")
    add_sampler_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".png":
        raise UserError(
            f"--out is {arguments.out}; give a name that ends in .png (the animation goes beside it as .gif)."
        )
    return arguments


def most_rounds(
    decoder: Decoder, config: SamplerConfig, prompts: Sequence[str], seed: int
) -> tuple[str, list[Generation]]:
    """The prompt whose answer takes most rounds, and what there was of the answer after each forward."""
    steps = [[] for _ in prompts]
    for answer in decoder.stream(prompts, config, batch_size=1, seed=seed, every=1):
        steps[answer.generation.index].append(answer.generation)
    chosen = max(steps, key=lambda steps: (len(set(steps[-1].rounds)), len(steps[-1].tokens)))
    return prompts[chosen[-1].index], chosen


def count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def animate(
    painter: Painter, title: str, steps: Sequence[Generation], summary: str, milliseconds: int, out: pathlib.Path
) -> None:
    """Writes the animation: what there is after each forward, and for three seconds the answer."""

    def frame(subtitle: str, order: Sequence[int]) -> Any:
        """In half size and few colours: an answer of many rounds has hundreds of frames."""
        image = painter.frame(title, subtitle, set(order))
        return image.resize((image.width // 2, image.height // 2)).quantize(64)

    shown = [(count(step.forwards, "forward"), step.order) for step in steps[:-1]] + [(summary, steps[-1].order)]
    frames = itertools.starmap(frame, shown)
    duration = [milliseconds] * (len(shown) - 1) + [3000]
    next(frames).save(out, save_all=True, append_images=frames, duration=duration, loop=0)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    compilation.keep_programs()
    logging.set_verbosity(logging.ERROR)

    decoder = decoder_of(arguments)
    config = settings_of(arguments, decoder)
    prompts = [arguments.prompt]
    if arguments.prompt is None:
        source = held_out(arguments.checkpoint, arguments.step)[0]
        prompts = [source[i][0] for i in itertools.islice(source.part(), 8)]
    prompt, steps = most_rounds(decoder, config, prompts, arguments.seed)

    final = steps[-1]
    painter = Painter(cells_of(decoder, final), config)
    counts = (count(len(final.tokens), "token"), count(painter.rounds, "round"), count(final.forwards, "forward"))
    summary = "{} in {} and {}: {:.2f} tokens per forward".format(*counts, final.tokens_per_forward)
    gif = arguments.out.with_suffix(".gif")
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        painter.picture(prompt, summary).save(arguments.out)
        animate(painter, prompt, steps, summary, arguments.milliseconds, gif)
    except OSError as error:
        raise UserError(f"Cannot write {arguments.out}: {error.strerror or error}. Choose another --out.") from None
    print(f"{summary}\nwrote {arguments.out} and {gif}")


if __name__ == "__main__":
    run_main(main)
