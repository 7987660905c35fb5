"""A bucket on this machine, for tests of object storage."""

import logging
import threading

import pytest
from processes import free_port


@pytest.fixture(scope="session")
def bucket():
    """Address of an empty bucket, kept in memory by an emulator, which child processes find too."""
    server_lib = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    port = free_port()
    address = f"http://localhost:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else it asks Google what kind of bucket it is
        pytest.importorskip("gcsfs", reason="needs gcsfs: pip install '.[gcs]'")
        patch.setattr(threading, "excepthook", lambda _: None)  # its threads complain of clients that have gone
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        say_generations(server_lib, patch)
        server = server_lib.create_server("localhost", port, in_memory=True, default_bucket="bucket")
        server.start()
        yield "gs://bucket"
        server.stop()


def say_generations(server_lib, patch: pytest.MonkeyPatch) -> None:
    """Lets the emulator say which generation of an object it gives, as Google's storage does: TensorStore wants it."""
    from gcp_storage_emulator.handlers import objects

    give = objects.download

    def download(request, response, storage, *arguments, **named):
        give(request, response, storage, *arguments, **named)
        if response.status.value < 300:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    patch.setattr(objects, "download", download)
    for _, handlers in server_lib.HANDLERS:
        for method, handler in list(handlers.items()):
            if handler is give:
                patch.setitem(handlers, method, download)
