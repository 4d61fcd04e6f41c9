"""The only room that opens config files: YAML with line marks, paths, atomic writes, shipped configs."""

from rslp.files.checksums import UNREADABLE, archive_damage, checksum, read_json, with_checksum, write_json
from rslp.files.document import MAX_BYTES, Braced, Document, Template, Unquoted, parse_yaml, plain_scalar, read_yaml
from rslp.files.dumping import dump_yaml
from rslp.files.paths import (
    PATH_ARGS,
    Anchored,
    anchor_paths,
    find_file,
    is_portable,
    paths_in,
    relativise_paths,
    resolve_paths,
    shipped,
)
from rslp.files.stores import Store, is_remote
from rslp.files.writing import append, full_disk, replacing, same_file, write_atomic

__all__ = [
    "MAX_BYTES",
    "PATH_ARGS",
    "UNREADABLE",
    "Anchored",
    "Braced",
    "Document",
    "Store",
    "Template",
    "Unquoted",
    "anchor_paths",
    "append",
    "archive_damage",
    "checksum",
    "dump_yaml",
    "find_file",
    "full_disk",
    "is_portable",
    "is_remote",
    "parse_yaml",
    "paths_in",
    "plain_scalar",
    "read_json",
    "read_yaml",
    "relativise_paths",
    "replacing",
    "resolve_paths",
    "same_file",
    "shipped",
    "with_checksum",
    "write_atomic",
    "write_json",
]
