"""The directory of checkpoints: names, atomic publication, removal, recovery after crashes.

A checkpoint is written under a temporary name and renamed once every byte is on the disk, so a directory
with a final name was complete when it got it. Only rank 0 changes names.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from megallama.checkpoint.format.disk import LOCAL_DISK, Disk, read_file, write_file
from megallama.checkpoint.format.record import (
    INDEX_FILE,
    MANIFEST_FILE,
    CheckpointManifest,
    FileRecord,
    TensorRecord,
    decode_index,
    decode_manifest,
    encode_manifest,
    new_digest,
)
from megallama.host.errors import DamagedError, UserError
from megallama.host.files import fsync_folder

_STEP = re.compile(r"step-(\d{8,})", re.ASCII)
_TEMPORARY = re.compile(r"\.tmp-step-\d{8,}-[0-9a-f]{8}", re.ASCII)
_REPLACED = re.compile(r"\.old-(step-\d{8,})-[0-9a-f]{8}", re.ASCII)
_MANIFEST_LIMIT_BYTES = 256 * 1024 * 1024


def step_name(step: int) -> str:
    """Name of the directory of one checkpoint."""
    return f"step-{step:08d}"


def is_step_name(name: str) -> bool:
    """Whether a checkpoint may be called so."""
    match = _STEP.fullmatch(name)
    return match is not None and name == step_name(int(match[1]))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` names one checkpoint rather than a folder of several."""
    return is_step_name(path.name) or (path / MANIFEST_FILE).exists()


def find_checkpoints(directory: Path) -> list[int]:
    """Steps of the checkpoints in `directory`, ascending; whether they are intact is not looked at."""
    steps = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if is_step_name(path.name) and path.is_dir():
            steps.append(int(path.name.removeprefix("step-")))
    return sorted(steps)


def checkpoints_below(path: Path) -> list[Path]:
    """The checkpoints of a run folder, or of a folder of checkpoints, ascending; none where there are none."""
    for directory in (path / "checkpoints", path):
        steps = find_checkpoints(directory)
        if steps:
            return [directory / step_name(step) for step in steps]
    return []


def no_checkpoint(path: Path) -> UserError:
    """Where `path` should have led to a checkpoint."""
    return UserError(f"no checkpoint at {path}: give a step-... directory or the train.run_dir of a run")


def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest of the checkpoint at `path`.

    Raises:
        DamagedError: missing or altered.
        UserError: `path` is no directory, or the format is newer.
    """
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give a step-... directory")
    manifest = decode_manifest(read_file(path / MANIFEST_FILE, limit_bytes=_MANIFEST_LIMIT_BYTES))
    match = _STEP.fullmatch(path.name)
    if match and int(match[1]) != manifest.step:
        raise DamagedError(f"{MANIFEST_FILE} is of step {manifest.step}, not of {path.name}")
    return manifest


def read_index(path: Path, manifest: CheckpointManifest) -> dict[str, TensorRecord]:
    """The index of the checkpoint at `path`, checked against its manifest.

    Raises:
        DamagedError: missing, altered, or pointing outside of the data files.
    """
    record = manifest.files[INDEX_FILE]
    raw = read_file(path / INDEX_FILE, limit_bytes=record.size_bytes)
    if len(raw) != record.size_bytes:
        raise DamagedError(f"{INDEX_FILE} has {len(raw)} bytes, the manifest says {record.size_bytes}")
    digest = new_digest(record.algorithm)
    digest.update(raw)
    if digest.hexdigest() != record.digest:
        raise DamagedError(f"{INDEX_FILE} does not match its checksum")
    return decode_index(raw, files=manifest.files)


def size_problems(path: Path, manifest: CheckpointManifest) -> list[str]:
    """Files of the checkpoint that are missing, of another kind or size. Reads no file."""
    problems = []
    for name, record in sorted(manifest.files.items()):
        file = path / name
        if file.is_symlink() or not file.is_file():
            problems.append(f"{name} is {'not a regular file' if os.path.lexists(file) else 'missing'}")
        elif file.stat().st_size != record.size_bytes:
            problems.append(f"{name} has {file.stat().st_size} bytes, the manifest says {record.size_bytes}")
    return problems


def check_sizes(path: Path, manifest: CheckpointManifest) -> None:
    """Raise DamagedError where `size_problems` finds any."""
    problems = size_problems(path, manifest)
    if problems:
        raise DamagedError("; ".join(problems))


def extra_files(path: Path, manifest: CheckpointManifest) -> list[str]:
    """Names in the checkpoint's directory that are not part of it."""
    return sorted({file.name for file in path.iterdir()} - manifest.files.keys() - {MANIFEST_FILE})


def start_temporary(directory: Path, *, step: int) -> Path:
    """A new empty directory for the checkpoint of `step`, after removing what crashed saves left."""
    directory.mkdir(parents=True, exist_ok=True)
    put_back_replaced(directory)
    for path in directory.iterdir():
        if _TEMPORARY.fullmatch(path.name) or _REPLACED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    temporary = directory / f".tmp-{step_name(step)}-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def put_back_replaced(directory: Path) -> None:
    """Undoes the first half of a replacement whose second half a crash prevented."""
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _REPLACED.fullmatch(path.name)
        if match and not (directory / match[1]).exists():
            os.replace(path, directory / match[1])


def write_manifest(temporary: Path, manifest: CheckpointManifest, *, disk: Disk = LOCAL_DISK) -> FileRecord:
    """Writes the manifest, the last file of a checkpoint, and waits for all names to be on the disk."""
    record = write_file(temporary / MANIFEST_FILE, encode_manifest(manifest), disk=disk)
    fsync_folder(temporary)
    return record


def publish(temporary: Path, *, step: int) -> Path:
    """Gives the complete checkpoint in `temporary` its name, in place of an older one of the same step."""
    directory = temporary.parent
    path = directory / step_name(step)
    replaced = None
    if path.exists():
        replaced = directory / f".old-{path.name}-{secrets.token_hex(4)}"
        os.replace(path, replaced)
    try:
        os.replace(temporary, path)
    except OSError:
        put_back_replaced(directory)
        raise
    fsync_folder(directory)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return path


def remove(path: Path) -> None:
    """Removes the checkpoint at `path`, so that half of one never bears its name."""
    doomed = path.parent / f".tmp-{path.name}-{secrets.token_hex(4)}"
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def is_complete(path: Path) -> bool:
    """Whether all files of the checkpoint are there with their sizes; contents are not read."""
    try:
        return not size_problems(path, read_manifest(path))
    except UserError:
        return False
