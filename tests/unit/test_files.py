"""Where s3:// is found, and what is tried again."""

import errno

import pytest

from geodistill.data import files


@pytest.fixture
def asked(monkeypatch):
    """The options that pyarrow's S3 file system was made with."""
    found = {}
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(files.fs, "S3FileSystem", lambda **options: found.update(options))
    files._remote.cache_clear()
    yield found
    files._remote.cache_clear()


def test_endpoint_and_region_come_from_the_environment(asked, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert files._remote("s3://bucket/some/key")[1] == "bucket/some/key"
    assert asked.pop("retry_strategy") is not None
    assert asked == {"endpoint_override": "http://127.0.0.1:8333", "region": "eu-west-1"}


def test_the_uri_comes_first(asked, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other")
    files._remote("s3://me:se%2Fcret@bucket/key?endpoint_override=127.0.0.1:9000&scheme=http&region=here")
    asked.pop("retry_strategy")
    wanted = {
        "endpoint_override": "127.0.0.1:9000",
        "scheme": "http",
        "region": "here",
        "access_key": "me",
        "secret_key": "se/cret",
    }
    assert asked == wanted


def test_without_an_endpoint_the_bucket_tells_its_region(asked, monkeypatch):
    monkeypatch.setattr(files.fs, "resolve_s3_region", lambda bucket: f"region of {bucket}")
    files._remote("s3://bucket/key")
    assert asked["region"] == "region of bucket"


@pytest.mark.parametrize(
    ("error", "times"), [(OSError("reset"), 3), (FileNotFoundError("x"), 1), (OSError(errno.ENOSPC, "full"), 1)]
)
def test_what_is_tried_again(monkeypatch, error, times):
    slept = []
    monkeypatch.setattr(files.time, "sleep", slept.append)
    tried = []

    def work():
        tried.append(1)
        raise error

    with pytest.raises(OSError):
        files.retried(work, attempts=3)
    assert len(tried) == times and slept == [1.0, 2.0][: times - 1]
    assert files.retried(lambda: 5) == 5
