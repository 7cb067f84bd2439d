"""The reader and the writer of payloads against hostile bytes, odd files, and the safetensors library as oracle."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskserve.dtypes import BY_CODE, DType, f32, f64, u8
from maskserve.errors import (
    DtypeError,
    NotComputableError,
    PayloadError,
    ShapeError,
    TooLargeError,
)
from maskserve.payload.format import (
    BytesPayload,
    Limits,
    Output,
    encode,
    parse_header,
    to_bytes,
)
from maskserve.payload.tensors import load, output
from maskserve.payload.variables import resolve
from tests.payload_cases import CASES, VALID, Case, Source, at_most, container, entry, named, one

WRITTEN = list(BY_CODE.values())

MIB = 2**20
unhurried = settings(deadline=None)  # a busy machine is no failure
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
refused_cases = pytest.mark.parametrize("case", [c for c in CASES if c.must is not None], ids=lambda case: case.id)
accepted_cases = pytest.mark.parametrize("case", [c for c in CASES if c.must is None], ids=lambda case: case.id)
large_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if c.id[0] == "F" or c.id in ("A28", "B30", "E02")], ids=lambda case: case.id
)


def serve(source: Source) -> None:
    """All that a request does to a payload before it computes."""
    header = parse_header(source.read, source.total)
    variables = resolve(header)
    payload = BytesPayload(source.read(0, source.total))
    for variable in [*variables.computed.values(), *variables.coordinates.values()]:
        load(payload, variable)


# --- the 148 cases


def test_there_are_148_cases() -> None:
    assert len({case.id for case in CASES}) == len(CASES) == 148


@every_case
def test_every_case_gets_its_verdict(case: Case) -> None:
    if case.must is None:
        serve(case.source())
        return
    with pytest.raises(case.must) as caught:
        serve(case.source())
    assert caught.type is case.must


@refused_cases
def test_a_message_is_one_short_printable_line(case: Case) -> None:
    assert case.must is not None
    with pytest.raises(case.must) as caught:
        serve(case.source())
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    assert "aaaaaaaaaa" * 13 not in message


@every_case
def test_no_case_costs_much_memory_or_time(case: Case) -> None:
    source = case.source()
    with at_most(24 * MIB, seconds=5), suppress(PayloadError):
        parse_header(source.read, source.total)


@large_cases
def test_a_large_header_is_refused_by_its_length_alone(case: Case) -> None:
    source = case.source()
    with at_most(MIB // 4, seconds=1), pytest.raises(TooLargeError):
        parse_header(source.read, source.total)
    assert source.largest == 8


@accepted_cases
def test_what_is_accepted_reads_as_the_library_reads_it(case: Case) -> None:
    payload = case.source().head
    assert ours(payload) == oracle(payload)


WITHIN_THE_CAP = {
    "shape of 500,000 dims": ('{"x":{"dtype":"U8","data_offsets":[0,1],"shape":[', "1,", '1]}}', NotComputableError),
    "unknown field": ('{"x":{"y":[', "1,", "1]}}", PayloadError),
    "empty objects": ('{"x":[', "{},", "{}]}", TooLargeError),
    "empty lists": ('{"x":[', "[],", "[]]}", PayloadError),
    "names": ("{", '"a":{},', '"b":{}}', TooLargeError),
    "metadata": ('{"__metadata__":{', '"a":"b",', '"c":"d"}}', PayloadError),
    "long name": ('{"', "a", '":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', TooLargeError),
    "long metadata": ('{"__metadata__":{"a":"', "a", '"}}', TooLargeError),
    "long dtype": ('{"x":{"shape":[1],"data_offsets":[0,1],"dtype":"', "a", '"}}', NotComputableError),
    "long number": ('{"x":{"shape":[1', "0", ']}}', PayloadError),
    "levels": ('{"x":', '{"x":', "1}", PayloadError),
    "escapes": ('{"', "\\u0000", '":1}', TooLargeError),
}  # fmt: skip


@pytest.mark.parametrize("bomb", WITHIN_THE_CAP)
def test_a_header_just_within_the_cap_costs_little(bomb: str) -> None:
    head, unit, tail, must = WITHIN_THE_CAP[bomb]
    times = (MIB - len(head) - len(tail)) // len(unit)
    payload = container(head + unit * times + tail, b"\0")
    with at_most(64 * MIB, seconds=5), pytest.raises(must) as caught:
        BytesPayload(payload)
    assert caught.type is must
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("case", "must"), [("D24", NotComputableError), ("E02", TooLargeError), ("B30", TooLargeError)]
)
def test_a_raised_header_cap_leaves_the_other_limits(case: str, must: type[Exception]) -> None:
    source = next(c for c in CASES if c.id == case).source()
    with pytest.raises(must) as caught:
        parse_header(source.read, source.total, Limits(header_bytes=16 * MIB))
    assert caught.type is must


def test_the_limits_are_where_they_say() -> None:
    def tensors(n: int) -> bytes:
        return container({f"t{i}": entry("U8", [0], 0, 0) for i in range(n)})

    assert len(BytesPayload(tensors(1024)).header.tensors) == 1024
    with pytest.raises(TooLargeError):
        BytesPayload(tensors(1025))
    assert BytesPayload(one("U8", [1] * 32, 1)).header.tensors["x"].shape == (1,) * 32
    with pytest.raises(NotComputableError):
        BytesPayload(one("U8", [1] * 33, 1))
    assert BytesPayload(named("é" * 128)).header.tensors
    with pytest.raises(TooLargeError):
        BytesPayload(named("é" * 128 + "a"))
    assert BytesPayload(one("U8", [2**48, 0], 0)).header.tensors
    with pytest.raises(NotComputableError):
        BytesPayload(one("U8", [2**48 + 1, 0], 0))
    metadata = {"k": "v" * (2**16 - 1)}
    assert BytesPayload(container({"__metadata__": metadata})).header.metadata == metadata
    with pytest.raises(TooLargeError):
        BytesPayload(container({"__metadata__": {"k": "v" * 2**16}}))


def test_an_error_about_a_tensor_names_it() -> None:
    with pytest.raises(PayloadError) as caught:
        BytesPayload(container({"ra\u200bin": entry("F32", [2], 0, 4)}, bytes(4)))
    assert caught.value.parameter == "ra\\u200bin"


def test_foreign_bytes_are_called_by_their_name() -> None:
    with pytest.raises(PayloadError, match=r"NumPy \.npy"):
        BytesPayload(next(c for c in CASES if c.id == "A32").source().head)


# --- the library as oracle


def oracle(payload: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = safetensors.deserialize(payload)
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found}


def ours(payload: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    read = BytesPayload(payload)
    return {n: (info.dtype.code, info.shape, bytes(read.read(n))) for n, info in read.header.tensors.items()}


SEEDS = [
    VALID,
    to_bytes([Output("a", f64, (2, 1), bytes(16)), Output("a.mask", BY_CODE["BOOL"], (2, 1), b"\1\0")], {"k": "v"}),
    to_bytes([Output(f"t{i}", WRITTEN[i], (i, 2), bytes(i * 2 * WRITTEN[i].n_bytes)) for i in range(len(WRITTEN))], {}),
    to_bytes([Output("s", f32, (), bytes(4)), Output("z", u8, (0, 3), b"")], {"é": "\n"}),
]
TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b" ", b"\t", b"\xff", b"\0"),
    *(b"0", b"1", b"4", b"-1", b"1.0", b"1e0", b"null", b"true", b"18446744073709551616", b"9223372036854775808"),
    *(b"\\u0078", b'"x"', b'"F32"', b'"U8"', b'"dtype"', b'"shape"', b"[0,4]", b'"__metadata__":{},'),
    b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
]


ALIKE = [
    *([b'"F32"', b'"I32"', b'"U32"', b'"F64"', b'"I64"', b'"BOOL"', b'"U8"', b'"I8"', b'"F8_E5M2"', b'"F4"'],),
    *(
        [b'"x"', b'"y"', b'"t3"', b'"mask"', b'"a"', b'"z"', b'"k"', b'"\\u0078"'],
        [b"[2,2]", b"[4]", b"[4,1]", b"[1,2,2]"],
    ),
    *([b"0", b"1", b"2", b"4", b"8", b"16"], [b",", b", ", b" ,", b",\t"], [b":", b" : "]),
]


def mutated(rng: random.Random) -> bytes:
    """A valid payload with bytes flipped, cut, put in or put for others of their kind; mostly with a true length."""
    payload = rng.choice(SEEDS)
    n = int.from_bytes(payload[:8], "little")
    keep_length = rng.random() < 0.8
    target = bytearray(payload[8 : 8 + n] if keep_length else payload)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        mutate(target, rng)
    return container(bytes(target), payload[8 + n :]) if keep_length else bytes(target)


def mutate(target: bytearray, rng: random.Random) -> None:
    at, token = rng.randrange(len(target) + 1), rng.choice(TOKENS)
    match rng.randrange(8):
        case 0 if target:
            target[at % len(target)] ^= 1 << rng.randrange(8)
        case 1:
            target[at:at] = token
        case 2:
            del target[at : at + rng.randrange(9)]
        case 3:
            target[at : at + rng.randrange(9)] = token
        case 4:
            target[at:at] = rng.choice(SEEDS)[8 + rng.randrange(40) :][: rng.randrange(60)]
        case _:
            kind = rng.choice(ALIKE)
            old, new = rng.sample(kind, 2)
            found = target.find(old, at)
            if found >= 0:
                target[found : found + len(old)] = new


@pytest.mark.parametrize("seed", range(4))
def test_whatever_we_accept_of_mutated_files_the_library_reads_alike(seed: int) -> None:
    rng = random.Random(seed)
    accepted = refused = 0
    for _ in range(6000):
        payload = mutated(rng)
        try:
            read = ours(payload)
        except PayloadError:
            refused += 1
            continue
        accepted += payload not in SEEDS
        assert read == oracle(payload), payload
    assert accepted > 150, accepted
    assert refused > 1000, refused


json_junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BY_CODE, "F4", "F6_E2M3", "f32"]) | json_junk,
        "shape": st.lists(st.integers(0, 4), max_size=3) | json_junk,
        "data_offsets": st.tuples(st.integers(0, 8), st.integers(0, 8)) | json_junk,
    },
    optional={"more": json_junk},
)


@unhurried
@given(
    header=st.dictionaries(st.sampled_from(["x", "y", "__metadata__"]) | st.text(max_size=3), entries | json_junk),
    n_body=st.integers(0, 12),
)
def test_whatever_header_we_accept_the_library_reads_alike(header: dict[str, object], n_body: int) -> None:
    payload = container(json.dumps(header), bytes(n_body))
    try:
        read = ours(payload)
    except PayloadError:
        return
    assert read == oracle(payload)


# --- writing


@st.composite
def tensors(draw: st.DrawFn, name: str = "x") -> Output:
    dtype: DType = draw(st.sampled_from(WRITTEN))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    n = dtype.n_bytes
    for size in shape:
        n *= size
    return Output(name, dtype, shape, draw(st.binary(min_size=n, max_size=n)))


names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8).filter(str.isprintable)


@unhurried
@given(
    drawn=st.dictionaries(names.filter(lambda n: n != "__metadata__"), tensors(), max_size=5),
    metadata=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(codec="utf-8"))),
    shift=st.integers(0, 7),
)
def test_what_is_written_is_read_again(drawn: dict[str, Output], metadata: dict[str, str], shift: int) -> None:
    outputs = [Output(name, out.dtype, out.shape, out.chunks) for name, out in drawn.items()]
    payload = to_bytes(outputs, metadata)
    shifted = memoryview(bytes(shift) + payload)[shift:]  # a body may start at any address
    read = BytesPayload(shifted)
    assert read.header.data_start % 8 == 0
    assert dict(read.header.metadata) == metadata
    assert ours(payload) == oracle(payload) == {o.name: (o.dtype.code, o.shape, o.chunks) for o in outputs}


def test_the_bytes_do_not_depend_on_the_order_in_which_things_come() -> None:
    outputs = [Output("b", u8, (1,), b"1"), Output("a", f32, (1,), bytes(4)), Output("A", u8, (1,), b"2")]
    metadata = {"k": "1", "a": "2"}
    first = to_bytes(outputs, metadata)
    assert first == to_bytes(outputs[::-1], dict(reversed(metadata.items())))
    assert list(BytesPayload(first).header.tensors) == ["a", "A", "b"]


def test_the_bytes_are_those_of_the_library() -> None:
    written = {"b": torch.arange(3.0), "a": torch.tensor([1, 2]), "m": torch.tensor([True])}
    outputs = [
        Output("b", f32, (3,), written["b"].numpy().tobytes()),
        Output("a", BY_CODE["I64"], (2,), written["a"].numpy().tobytes()),
        Output("m", BY_CODE["BOOL"], (1,), b"\1"),
    ]
    assert to_bytes(outputs, {"k": "v"}) == safetensors.torch.save(written, {"k": "v"})


def test_the_size_is_known_before_a_chunk_is_made() -> None:
    def chunks() -> Iterator[bytes]:
        raise AssertionError("asked for too early")
        yield b""

    encoded = encode([Output("x", f32, (1024,), chunks())], {})
    assert encoded.n_bytes == len(to_bytes([Output("x", f32, (1024,), bytes(4096))], {}))


@pytest.mark.parametrize("chunks", [b"123", b"12345", [b"12", b"3"], [b"1234", b"5"]])
def test_bytes_that_do_not_fit_the_shape_are_not_written(chunks: bytes | list[bytes]) -> None:
    with pytest.raises(ShapeError):
        to_bytes([Output("x", f32, (1,), chunks)], {})


def test_more_bytes_than_were_promised_are_never_sent() -> None:
    encoded = encode([Output("x", f32, (2,), iter([b"1234", b"56789", b"more"]))], {})
    sent = []
    with pytest.raises(ShapeError):
        sent.extend(encoded.chunks)
    assert sum(chunk.nbytes for chunk in sent) == encoded.n_bytes - 4


@pytest.mark.parametrize("name", ["", "a\nb", "__metadata__", "x"])
def test_a_name_that_could_not_be_read_again_is_not_written(name: str) -> None:
    with pytest.raises(NotComputableError):
        to_bytes([Output("x", u8, (0,), b""), Output(name, u8, (0,), b"")], {})


def test_bytes_are_read_without_a_copy() -> None:
    body = bytearray(VALID)
    read = BytesPayload(body).read("x")
    body[-20] = 7
    assert read[0] == 7
    assert len(read) == 16


def test_reading_and_writing_payloads_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; import maskserve.payload.format, maskserve.payload.variables, maskserve.payload.json\n"
        "print(sorted({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_what_a_payload_cannot_hold_is_not_among_what_it_can() -> None:
    with pytest.raises(DtypeError) as caught:
        output("z", torch.ones(2, dtype=torch.complex128))
    said, allowed = str(caught.value).split("give one of ")
    assert said == "z is complex128, which a payload cannot hold: "
    for word in allowed.split(", "):
        assert output("x", torch.zeros(2, dtype=getattr(torch, word))).n_bytes
    assert "complex64" in allowed.split(", ")
