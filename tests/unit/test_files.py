"""Where s3:// is found, and what is tried again."""

import errno

import pytest

from geodistill.cluster import free_port
from geodistill.data import files


@pytest.fixture
def asked(monkeypatch):
    """The options that pyarrow's S3 file system was made with."""
    found = {}
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(files.fs, "S3FileSystem", lambda **options: found.update(options))
    monkeypatch.setattr(files, "_reach", lambda endpoint: None)
    files._remote.cache_clear()
    yield found
    files._remote.cache_clear()


def test_endpoint_and_region_come_from_the_environment(asked, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert files._remote("s3://bucket/some/key")[1] == "bucket/some/key"
    assert asked.pop("retry_strategy") is not None
    assert asked == {"endpoint_override": "http://127.0.0.1:8333", "region": "eu-west-1"}


@pytest.mark.parametrize("key", ["run#2/teacher", "a b/ü/100%.tif", ""])
def test_a_key_is_what_is_written(asked, monkeypatch, key):
    """An address is no URL: # begins no fragment, and nothing is put into lower case."""
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert files._remote(f"s3://My.Bucket/{key}")[1] == f"My.Bucket/{key}".rstrip("/")


@pytest.mark.parametrize(
    "address", ["s3://me:se%2Fcret@bucket/key", "s3://me:se/cret@bucket/key", "s3://bucket/key?secret_key=se%2Fcret"]
)
def test_no_credentials_in_an_address(address):
    """Addresses are written to files and logs; an error does not repeat them."""
    with pytest.raises(ValueError, match="come from the environment") as error:
        files.open_folder(address)
    assert "cret" not in str(error.value) and "s3://bucket/key" in str(error.value)


def test_a_wrong_endpoint_is_told_soon(monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"s3://bucket/key cannot be opened \(nobody listens at AWS_ENDPOINT_URL=http://127"):
        files.open_folder("s3://bucket/key")


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


def test_lines_that_are_whole_are_read(tmp_path):
    folder = files.open_folder(tmp_path)
    assert files.read_lines(folder, "rows.jsonl") == []
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\n{"step": 2, "text": "a\u2028b"}\n{"ste')
    assert files.read_lines(folder, "rows.jsonl") == [{"step": 1}, {"step": 2, "text": "a\u2028b"}]


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name, file in (("one", "model.json"), ("two", "old.json")):
        with files.written(tmp_path / name) as here:
            (here / file).write_text(name)
    files.replace_folder(f"{tmp_path}/one", f"{tmp_path}/two")
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["model.json"]
    assert files.read_text(*files.beside(tmp_path / "two/model.json")) == "one"
