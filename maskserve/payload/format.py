"""The payload format, safetensors: its reader, its writer and the files it lives in, in one place. Imports no torch."""

from __future__ import annotations

from maskserve.payload.files import BytesPayload, FilePayload, Payload, open_payload, save
from maskserve.payload.header import DEFAULT_LIMITS, Buffer, Header, Limits, TensorInfo, parse_header
from maskserve.payload.writing import Encoded, Output, encode, encode_header, to_bytes

__all__ = [
    "Limits", "TensorInfo", "Header", "parse_header",
    "Payload", "BytesPayload", "FilePayload", "open_payload",
    "Output", "Encoded", "encode", "encode_header", "to_bytes", "save",
    "Buffer", "DEFAULT_LIMITS",
]  # fmt: skip
