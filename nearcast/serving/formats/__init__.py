"""Is every file of a version something that a version may hold? Decided by its bytes, without loading anything.

A list of what is allowed decides: the model in its engine's format, what the model or the golden vectors take from a
file, safetensors, JSON and plain text. A look for what must not be here (pickles, archives, programs) comes on top,
under any name; nothing of this mesh would ever open one. Nothing here runs or maps a file.
"""

from __future__ import annotations

from pathlib import Path

from nearcast.errors import Code, MeshError
from nearcast.serving.formats.foreign import find_foreign
from nearcast.serving.formats.onnx import check_onnx
from nearcast.serving.formats.safetensors import check_safetensors, is_safetensors
from nearcast.serving.formats.text import check_json, is_text
from nearcast.serving.formats.tflite import check_tflite
from nearcast.store.contents import Contents

MODEL_SIZE_BYTES_MAX = 2**31 - 1
"""Protocol buffers and FlatBuffers end there: both count with 32 bits."""
FILES_MAX = 256


def require_format(contents: Contents) -> None:
    """Refuse a version whose files are not what they must be, or name files outside of the version.

    Raises:
        MeshError: UNTRUSTED with the reason; as `Contents.read` if a file cannot be read.
    """
    manifest = contents.manifest
    if len(manifest.files) > FILES_MAX:
        raise MeshError(Code.UNTRUSTED, f"The version has more than {FILES_MAX} files.")
    if manifest.file(manifest.model_file).size_bytes > MODEL_SIZE_BYTES_MAX:
        raise MeshError(Code.UNTRUSTED, f"The model file is larger than {MODEL_SIZE_BYTES_MAX} bytes.")
    for entry in manifest.files:
        require_own_file(contents.folder / entry.path)
    taken = _check_model(contents) | {t.file for v in manifest.golden for t in (*v.inputs, *v.outputs)}
    for entry in manifest.files:
        try:
            _check_file(contents, entry.path, is_taken=entry.path in taken)
        except MeshError as error:
            raise MeshError(error.code, f"The file {entry.path} is refused: {error.message}") from error


def require_own_file(path: Path) -> None:
    """Refuse what is no regular file, or one that has another name too, under which it could be changed.

    Raises:
        MeshError: UNTRUSTED.
    """
    try:
        status = path.lstat()
    except OSError:
        status = None
    if status is None or path.is_symlink() or not path.is_file():
        raise MeshError(Code.UNTRUSTED, f"The file {path.name} is missing or no regular file.")
    if status.st_nlink > 1:
        raise MeshError(Code.UNTRUSTED, f"The file {path.name} is a hard link; a version holds files of its own.")


def _check_model(contents: Contents) -> set[str]:
    """Check the model file; answers the files that it takes data from."""
    manifest = contents.manifest
    data = contents.read(manifest.model_file)
    if manifest.engine == "litert":
        try:
            check_tflite(data)
        except MeshError as error:
            raise MeshError(
                Code.UNTRUSTED, f"The file {manifest.model_file} is no TFLite model: {error.message}"
            ) from error
        return set()
    listed = {entry.path for entry in manifest.files}
    try:
        ranges = check_onnx(data)
    except MeshError as error:
        raise MeshError(Code.UNTRUSTED, f"The file {manifest.model_file} is no ONNX model: {error.message}") from error
    for part in ranges:
        if part.location not in listed or part.location == manifest.model_file:
            raise MeshError(
                Code.UNTRUSTED, f"The model takes data from {part.location[:128]!r}, which is no file of its manifest."
            )
        # Of plain bytes: a sealed file is shorter once it is open.
        if part.offset + part.length > len(contents.read(part.location)):
            raise MeshError(Code.UNTRUSTED, f"The model takes data from beyond the end of {part.location}.")
    return {part.location for part in ranges}


def _check_file(contents: Contents, path: str, *, is_taken: bool) -> None:
    manifest, data = contents.manifest, contents.read(path)
    if foreign := find_foreign(data):
        raise MeshError(Code.UNTRUSTED, f"it is {foreign}, which no version may hold.")
    if path == manifest.model_file or is_taken:
        return
    if path == manifest.sbom_file or path.endswith(".json"):
        check_json(data)
    elif is_safetensors(data):
        check_safetensors(data)
    elif not is_text(data):
        raise MeshError(Code.UNTRUSTED, "it is neither text nor safetensors, and neither model nor vectors use it.")
