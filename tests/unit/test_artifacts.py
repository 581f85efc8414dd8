"""Files by a key: whole or not there, in a folder and in a store that fsspec reaches; full disks and wrong addresses are told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from deployments.errors import StoreUnavailable
from deployments.store.artifacts import ArtifactStore
from deployments.store.jobs import JobStore
from deployments.store.migrate import migrate
from deployments.store.settings import STORE_ROOT_VARIABLE, StoreSettings
from tests.job_work import PNG, files, leased, new, submitted
from tests.store_places import at_once

KEY = "jobs/job_1/art_1.png"


@pytest.fixture(params=["folder", "file url", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    places = {"folder": str(tmp_path / "a"), "file url": f"file://{tmp_path / 'a'}", "memory": f"memory://{uuid4().hex}"}
    return ArtifactStore(places[request.param])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_what_is_put_is_there_until_it_is_deleted(store: ArtifactStore) -> None:
    assert list(store.keys()) == [] and store.get(KEY) is None and not store.exists(KEY) and store.age(KEY) is None
    store.put(KEY, PNG)
    store.put("jobs/job_2/art_2.bin", b"")
    assert store.get(KEY) == PNG and store.get("jobs/job_2/art_2.bin") == b"" and store.exists(KEY)
    assert sorted(store.keys()) == [KEY, "jobs/job_2/art_2.bin"]
    age = store.age(KEY)
    assert age is not None and -1 < age < 60
    store.put(KEY, b"another")
    assert store.get(KEY) == b"another"
    for _ in range(2):
        store.delete(KEY)
    assert store.get(KEY) is None and list(store.keys()) == ["jobs/job_2/art_2.bin"]


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "jobs/../x", "jobs//x", "jobs/.x", "a\0", "Jobs/x", "jobs/x/", "é"])
def test_what_is_no_key_reaches_no_file(store: ArtifactStore, key: str) -> None:
    for question in (store.get, store.delete, store.exists, lambda given: store.put(given, PNG)):
        with pytest.raises(ValueError, match="no key"):
            question(key)
    assert list(store.keys()) == []


def test_a_folder_goes_with_its_last_file_and_nothing_else_lies_about(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    store.put(KEY, PNG)
    store.put("jobs/job_1/art_2.png", PNG)
    store.delete(KEY)
    assert (tmp_path / "jobs/job_1").is_dir()
    store.delete("jobs/job_1/art_2.png")
    assert list((tmp_path / "jobs").iterdir()) == [] and list((tmp_path / ".arriving").iterdir()) == []


def test_processes_that_clear_a_folder_away_do_not_disturb_who_writes_into_it(tmp_path: Path) -> None:
    at_once(put_and_delete, *((tmp_path, f"jobs/job_1/art_{k}.png", 300) for k in range(2)))
    assert list(ArtifactStore(str(tmp_path)).keys()) == []


def put_and_delete(folder: Path, key: str, rounds: int) -> None:
    store = ArtifactStore(str(folder))
    for _ in range(rounds):
        store.put(key, PNG)
        assert store.get(key) == PNG
        store.delete(key)


def test_what_was_begun_long_ago_is_cleared(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    store.put(KEY, PNG)
    old, fresh = tmp_path / ".arriving" / "old", tmp_path / ".arriving" / "fresh"
    for path in (old, fresh):
        path.write_bytes(PNG)
    os.utime(old, (0, 0))
    store.clear_arriving(3600)
    assert not old.exists() and fresh.exists() and store.exists(KEY)


def test_a_full_disk_leaves_no_part_of_a_file(small_disk: Path) -> None:
    store = ArtifactStore(str(small_disk))
    store.put(KEY, b"x" * 10_000)
    with pytest.raises(StoreUnavailable, match="No space left"):
        store.put("jobs/job_1/art_2.png", b"x" * 100_000)
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["art_1.png"]
    assert store.get(KEY) == b"x" * 10_000
    with pytest.raises(StoreUnavailable):
        store.put(KEY, b"y" * 100_000)
    assert store.get(KEY) == b"x" * 10_000, "what was there stays"


def test_a_job_that_does_not_fit_on_the_disk_is_not_half_there(tmp_path: Path, small_disk: Path) -> None:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    store = JobStore(url, ArtifactStore(str(small_disk)))
    with pytest.raises(StoreUnavailable, match="No space left"):
        store.submit("ada", new(pictures={"a": b"x" * 20_000, "b": b"x" * 60_000}))
    assert store.list("ada") == () and [path for path in small_disk.rglob("*") if path.is_file()] == []
    id = submitted(store, pictures={"a": b"x" * 20_000})
    lease = leased(store)
    answer = {"data": [{"seed": 1}, {"seed": 2}]}
    with pytest.raises(StoreUnavailable):
        store.succeed(lease, answer, [(b"x" * 20_000, "image/png"), (b"x" * 60_000, "image/png")], {})
    assert store.get(id, "ada").status == "running" and len([path for path in small_disk.rglob("*") if path.is_file()]) == 1
    assert store.succeed(lease, answer, [(PNG, "image/png")] * 2, {}) is not None, "once there is room"
    store.close()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(StoreUnavailable, match="taken"):
        ArtifactStore(str(tmp_path / "taken")).put(KEY, PNG)
    assert files(tmp_path) == []


@pytest.mark.parametrize("url", ["relative/folder", "file://relative", "nosuch://bucket/folder", ""])
def test_an_address_that_leads_nowhere_is_told(url: str) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        ArtifactStore(url)
    assert "absolute path" in caught.value.remedy


def test_a_store_that_does_not_answer_is_told_without_its_password() -> None:
    with pytest.raises(StoreUnavailable) as caught:
        ArtifactStore("ftp://ada:secret-word@127.0.0.1:1/x")
    assert "secret-word" not in str(caught.value) and "***@127.0.0.1" in str(caught.value)


def test_artifacts_lie_where_the_settings_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(STORE_ROOT_VARIABLE, str(tmp_path))
    assert StoreSettings().artifacts_url == str(tmp_path / "artifacts")
    assert StoreSettings.model_validate({"folder": "/srv/likeness"}).artifacts_url == "/srv/likeness/artifacts"
    assert StoreSettings(artifacts="s3://bucket/jobs").artifacts_url == "s3://bucket/jobs"
