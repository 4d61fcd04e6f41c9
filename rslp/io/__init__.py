"""Files: YAML with line numbers, paths in configs, atomic writes, checksums, locks, object stores."""

from rslp.io.atomic import append, atomic_stream, full_disk, link_or_copy, new_folder, replace_folder, write_atomic
from rslp.io.checksums import (
    LOAD_ERRORS,
    archive_damage,
    checksum,
    json_with_checksum,
    read_json,
    with_checksum,
    write_json,
)
from rslp.io.objectstore import Folder, ObjectStore, is_remote
from rslp.io.paths import (
    PATH_ARGS,
    Anchored,
    anchor_paths,
    find_file,
    is_portable,
    paths_in,
    relativise_paths,
    resolve_paths,
    shipped_config,
)
from rslp.io.yaml import MAX_BYTES, Braced, Document, Template, Unquoted, dump_yaml, parse_yaml, plain_scalar, read_yaml

__all__ = [
    "LOAD_ERRORS",
    "MAX_BYTES",
    "PATH_ARGS",
    "Anchored",
    "Braced",
    "Document",
    "Folder",
    "ObjectStore",
    "Template",
    "Unquoted",
    "anchor_paths",
    "append",
    "archive_damage",
    "atomic_stream",
    "checksum",
    "dump_yaml",
    "find_file",
    "full_disk",
    "is_portable",
    "is_remote",
    "json_with_checksum",
    "link_or_copy",
    "new_folder",
    "parse_yaml",
    "paths_in",
    "plain_scalar",
    "read_json",
    "read_yaml",
    "relativise_paths",
    "replace_folder",
    "resolve_paths",
    "shipped_config",
    "with_checksum",
    "write_atomic",
    "write_json",
]
