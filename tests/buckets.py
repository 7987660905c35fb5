"""A bucket on this machine, for tests of object storage."""

import http.server
import logging
import os
import threading

import pytest

HOST = "127.0.0.1"  # not "localhost", which may be an address that nobody listens to


@pytest.fixture(scope="session")
def bucket():
    """Address of an empty bucket, kept in memory by an emulator, which child processes find too.

    One for all modules: clients keep the server that they have found first. Nothing but the loopback is asked for
    credentials or anything else.
    """
    server_lib = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: None)  # its threads complain of clients that have gone
        patch.setattr(http.server.HTTPServer, "request_queue_size", 128)  # many processes ask at once
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        say_generations(server_lib, patch)
        server = server_lib.create_server(HOST, 0, in_memory=True, default_bucket="bucket")
        server.start()
        address = f"http://{HOST}:{server._api._httpd.server_port}"
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else it asks Google what kind of bucket it is
        for proxy in ("no_proxy", "NO_PROXY"):
            patch.setenv(proxy, ",".join(filter(None, (os.environ.get(proxy), HOST))))
        # Else both look for credentials in the home and on the network.
        patch.setenv("FSSPEC_GS_TOKEN", "anon")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        pytest.importorskip("gcsfs", reason="needs gcsfs: pip install '.[gcs]'")
        import fsspec

        patch.setitem(fsspec.config.conf, "gs", fsspec.config.conf.get("gs", {}) | {"token": "anon"})
        yield "gs://bucket"
        server.stop()


@pytest.fixture(scope="session")
def s3_bucket():
    """Address of an empty s3:// bucket, kept in memory by an emulator."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install '.[s3]'")
    server_lib = pytest.importorskip("moto.server", reason="needs moto[s3,server]")
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        server = server_lib.ThreadedMotoServer(HOST, 0, verbose=False)
        server.start()
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "none")
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
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
