"""Damaged and crafted files: python -m tests.attack.files --tries 200.

Damage changes bytes at random (a bit, a byte, a block, a length); what is read afterwards must be
refused or be what was written. Crafted files have a right checksum and wrong contents.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import fadapt
from fadapt.io.tensors import _digest, read_tensors
from tests.attack.tally import SILENT, Tally, attempt

Contents = tuple[dict[str, Any], dict[str, Tensor]]
Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]
SITE = "0.weight"


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8, bias=False))


def contents(path: Path) -> Contents:
    """The metadata and tensors of a file, with another reader than the one under test."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["fadapt"]), from_bytes(raw)


def craft(path: Path, meta: Any, tensors: dict[str, Tensor], keep_leaves: bool = False) -> None:
    """A file with a right checksum; its list of leaves follows the tensors."""
    if isinstance(meta, dict) and not keep_leaves:
        leaves = {k: [list(t.shape), str(t.dtype)[6:]] for k, t in tensors.items()}
        meta = {**meta, "leaves": leaves}
    text = meta if isinstance(meta, str) else json.dumps(meta)
    path.write_bytes(to_bytes(tensors, {"fadapt": text, "sha256": _digest(text, tensors)}))


class Target:
    """One kind of file: how it is made, read, and known to be as it was."""

    def __init__(self, directory: Path, name: str):
        self.path = directory / name
        self.model = base()
        self.write()
        self.raw = self.path.read_bytes()
        self.contents = contents(self.path)
        self.wanted = self.seen(self.read())

    def write(self) -> None:
        raise NotImplementedError

    def read(self) -> Any:
        raise NotImplementedError

    def seen(self, result: Any) -> Any:
        """The result in a form that can be compared."""
        raise NotImplementedError


class AdapterFile(Target):
    def write(self) -> None:
        chain = fadapt.Chain((fadapt.DoRA(r=2), fadapt.LoRA(r=1)))
        params = fadapt.init(self.model, {"0": fadapt.LoRA(r=2), "2": chain})
        fadapt.save(fadapt.scale(params, 0.5), self.path)

    def read(self) -> Any:
        return fadapt.load(self.path, self.model)

    def seen(self, result: Any) -> Any:
        return {
            (name, repr(a.site), repr(a.method), k): t.detach().tolist()
            for name, a in result.items()
            for k, t in a.leaves.items()
        }


class StatsFile(Target):
    def write(self) -> None:
        rows = [torch.randn(64, 16, generator=torch.Generator().manual_seed(1))]
        method = fadapt.EVA(r=2)
        stats = fadapt.observe(self.model, method, rows, progress=False, share=False)
        stats.save(self.path)

    def read(self) -> Any:
        return fadapt.init(self.model, fadapt.EVA(r=2), fadapt.Stats.load(self.path, self.model))

    def seen(self, result: Any) -> Any:
        return {n: {k: t.detach().tolist() for k, t in a.leaves.items()} for n, a in result.items()}


class PlainFile(Target):
    """The layer itself, as a checkpoint uses it."""

    def write(self) -> None:
        from fadapt.io.tensors import FORMAT_VERSION, write_tensors

        tensors = {"a|b": torch.randn(3, 4), "n": torch.tensor(3), "flag": torch.tensor([True])}
        write_tensors(tensors, {"format_version": FORMAT_VERSION, "step": 3}, self.path)

    def read(self) -> Any:
        return read_tensors(self.path)

    def seen(self, result: Any) -> Any:
        meta, tensors = result
        return meta, {k: (str(t.dtype), t.tolist()) for k, t in tensors.items()}


def damage(raw: bytes, rng: random.Random) -> bytes:
    """The bytes with one random damage."""
    data = bytearray(raw)
    kind = rng.choice(("bit", "byte", "block", "cut", "grow", "swap", "header", "drop"))
    at = rng.randrange(len(data))
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "block":
        size = rng.randrange(1, 64)
        data[at : at + size] = bytes(rng.randrange(256) for _ in data[at : at + size])
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data += bytes(rng.randrange(1, 100))
    elif kind == "swap":
        other = rng.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    elif kind == "header":
        start = 8 + int.from_bytes(data[:8], "little")
        data[rng.randrange(start)] = rng.choice(b'0123456789"{}[],:-.eE\\ \x00\xff')
    else:
        del data[at : at + rng.randrange(1, 16)]
    return bytes(data)


def nested(depth: int) -> dict[str, Any]:
    method: dict[str, Any] = {"method": "LoRA", "fields": {"r": 2}}
    for _ in range(depth):
        method = {"method": "Chain", "fields": {"methods": [method]}}
    return method


def leaf(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape).to(dtype)


def crafted_adapters() -> dict[str, Change]:
    """{what is wrong: a change of the metadata and tensors in place}."""
    key = f"{SITE}|train|"
    cases: dict[str, Change] = {}

    def site(name: str, value: Any) -> None:
        cases[f"site.{name} = {value!r:.40}"] = lambda m, t: m["sites"][SITE]["site"].update(
            {name: value}
        )

    def fields(name: str, value: Any) -> None:
        cases[f"method.{name} = {value!r:.40}"] = lambda m, t: m["sites"][SITE]["method"][
            "fields"
        ].update({name: value})

    def top(name: str, value: Any) -> None:
        cases[f"{name} = {value!r:.40}"] = lambda m, t: m.update({name: value})

    def config(name: str, value: Any) -> None:
        cases[f"config.{name} = {value!r:.40}"] = lambda m, t: m["config"].update({name: value})

    def tensor(name: str, what: str, value: Tensor) -> None:
        cases[f"{name} {what}"] = lambda m, t: t.update({key + name: value})

    odd: list[Any] = [None, 5, -1, 0, 2.5, True, "x", "", [], {}, [1], {"a": 1}, 10**400, "1e9"]
    for value in odd:
        for name in ("name", "out_features", "in_features", "kernel", "tied", "experts", "kind"):
            empty = value == [] and name in ("kernel", "tied")
            zero = value == 0 and name == "experts" and value is not True
            if not empty and not zero:
                site(name, value)
        if not isinstance(value, str):
            for name in ("role", "note", "fingerprint"):
                site(name, value)
        site("bias", value)
        if value is not False:
            site("transposed", value)
        fields("r", value)
        top("sites", value)
        if value not in (None, 0, "", [], {}):
            top("config", value)
        top("format_version", value)
        if value not in ([], {}):
            config("rules", value)
            config("exclude", value)
        config("dtype", value if value not in (None, 0, "", [], {}) else "int32")
    for value in (None, "x", [], {}, 10**400, {"method": "LoRA"}):
        fields("alpha", value)
    fields("unknown", 1)
    for name in ("Nothing", "", None, 5, [], "os:system", "Method", "torch:Tensor", "__main__:X"):
        cases[f"method {name!r}"] = lambda m, t, name=name: m["sites"][SITE]["method"].update(
            method=name
        )
    for value in (None, 5, "x", [], {}, {"method": "LoRA"}, {"fields": {}}):
        cases[f"method record {value!r}"] = lambda m, t, v=value: m["sites"][SITE].update(method=v)
    for depth in (20, 100, 250):
        cases[f"Chain {depth} deep"] = lambda m, t, d=depth: m["sites"][SITE].update(
            method=nested(d)
        )
        cases[f"a rule of {depth} Chains"] = lambda m, t, d=depth: m["config"].update(
            rules=[["", nested(d)]]
        )
    for pattern in ("(" * 3000 + ")" * 3000, "a{99999999999}", "(", "*", "(?P<a>x)(?P<a>y)"):
        config("rules", [[pattern, None]])
        config("exclude", [pattern])
    for name in ("site", "method", "train", "fixed"):
        cases[f"no {name}"] = lambda m, t, n=name: m["sites"][SITE].pop(n)
    for name in ("config", "sites", "format_version"):
        cases[f"no {name} at the top"] = lambda m, t, n=name: m.pop(n)
    for value in (None, 5, "AB", ["A"], ["A", "B", "C"], ["A", "A"], [1, 2], {"A": 1}, [[]]):
        cases[f"train = {value!r}"] = lambda m, t, v=value: m["sites"][SITE].update(train=v)
    cases["a leaf in both parts"] = lambda m, t: (
        m["sites"][SITE].update(fixed=["A", "strength"]),
        t.update({f"{SITE}|fixed|A": leaf((2, 16))}),
    )
    cases["no site at all"] = lambda m, t: (m.update(sites={}), t.clear())
    cases["rank 5 under r = 2"] = lambda m, t: t.update(
        {key + "A": leaf((5, 16)), key + "B": leaf((16, 5))}
    )
    cases["r = 10**12 with leaves of 2"] = lambda m, t: m["sites"][SITE]["method"]["fields"].update(
        r=10**12
    )
    for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.float8_e5m2):
        tensor("A", f"in {dtype}", leaf((2, 16), dtype))
    for shape in ((2, 15), (3, 16), (16, 2), (32,), (), (1, 2, 16), (0, 16), (2, 16, 1)):
        tensor("A", f"of shape {shape}", leaf(shape))
    for shape in ((2,), (1,), (0,), (16, 16)):
        cases[f"strength of shape {shape}"] = lambda m, t, s=shape: t.update(
            {f"{SITE}|fixed|strength": leaf(s)}
        )
    cases["strength trainable"] = lambda m, t: (
        m["sites"][SITE].update(train=["A", "B", "strength"], fixed=[]),
        t.update({key + "strength": t.pop(f"{SITE}|fixed|strength")}),
    )
    chain = "2.weight|"
    cases["a link of a Chain without its leaf"] = lambda m, t: (
        m["sites"]["2.weight"].update(train=["0.A", "0.B", "1.A"]),
        t.pop(chain + "train|1.B"),
    )
    cases["norms of another width"] = lambda m, t: t.update(
        {k: leaf((7,)) for k in t if k.startswith(chain + "fixed|0.")}
    )
    return cases


def crafted_stats() -> dict[str, Change]:
    cases: dict[str, Change] = {}

    def top(name: str, value: Any) -> None:
        cases[f"{name} = {value!r:.40}"] = lambda m, t: m.update({name: value})

    for value in (None, 5, "x", [], {}, [1], {"0.weight": 5}, {"0.weight": "zzz"}, 10**400):
        top("streams", value)
        top("base", value)
        top("states", value)
        top("format", value)
        top("format_version", value)
    for value in (None, "x", [], math.nan, math.inf, -0.1, 1.1, True, 10**400):
        top("tolerance", value)
    for name in ("streams", "base", "tolerance", "states", "format", "format_version"):
        cases[f"no {name}"] = lambda m, t, n=name: m.pop(n)

    def entry(i: int, value: Any) -> None:
        cases[f"states[0][{i}] = {value!r:.40}"] = lambda m, t: m["states"][0].__setitem__(i, value)

    for value in (None, 5, "x", [], {}, "2.weight"):
        entry(0, value)
    for value in (None, 5, "x", [], "out "):
        entry(1, value)
    for value in (None, 5, "Nothing", [], {}, "Gram", "Sum", "Reduction", "PCA"):
        entry(2, value)
    for value in (None, 5, "x", [], {"k": 3}, {"unknown": 1}):
        entry(3, value)
    cases["a Sketch of k = -1"] = lambda m, t: m["states"].__setitem__(
        0, ["0.weight", "in", "Sketch", {"k": -1, "center": True, "seed": 0}]
    )
    for n in (-5.0, math.nan, math.inf, 1e300, 2.5):
        cases[f"n = {n}"] = lambda m, t, n=n: t.update(
            {"0.n": torch.tensor(n, dtype=torch.float64)}
        )
        cases[f"bad = {n}"] = lambda m, t, n=n: t.update(
            {"0.bad": torch.tensor(n, dtype=torch.float64)}
        )
    cases["n is a vector"] = lambda m, t: t.update({"0.n": torch.ones(3, dtype=torch.float64)})
    cases["n is int32"] = lambda m, t: t.update({"0.n": torch.tensor(64, dtype=torch.int32)})
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "of another width": lambda s: torch.eye(5, dtype=torch.float64),
        "not symmetric": lambda s: s.tril(-1) * 100 + s,
        "negative": lambda s: -s,
        "in float32": lambda s: s.float(),
        "of bools": lambda s: s > 0,
        "empty": lambda s: s[:0].clone(),
        "three axes": lambda s: s[None].clone(),
    }
    for what, change in changes.items():
        cases[f"scatter {what}"] = lambda m, t, c=change: t.update({"0.scatter": c(t["0.scatter"])})
    cases["all states of another width"] = lambda m, t: t.update(
        {
            "0.scatter": torch.eye(5, dtype=torch.float64),
            "0.mean": torch.zeros(5, dtype=torch.float64),
        }
    )
    cases["a mean is missing"] = lambda m, t: t.pop("0.mean")
    cases["a tensor too many"] = lambda m, t: t.update({"9.n": torch.ones(2)})
    return cases


def raw_files(raw: bytes) -> dict[str, bytes]:
    """Files that are wrong before their metadata are read."""
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    first = next(k for k in sorted(header) if k != "__metadata__")

    def packed(changed: Any, rest: bytes = body) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + rest

    def entry(**changes: Any) -> bytes:
        changed = copy.deepcopy(header)
        changed[first].update(changes)
        return packed(changed)

    begin, end = header[first]["data_offsets"]
    text = json.dumps(header)
    return {
        "empty": b"",
        "seven bytes": raw[:7],
        "only a length": raw[:8],
        "text": b"hello, world, this is not a file of tensors",
        "a pickle": b"\x80\x04\x95\x00\x00\x00",
        "a zip": b"PK\x03\x04" + bytes(60),
        "length 0": bytes(8) + raw[8:],
        "length 2**63": (2**63).to_bytes(8, "little") + raw[8:],
        "length 2**64 - 1": b"\xff" * 8 + raw[8:],
        "length too small": (length - 9).to_bytes(8, "little") + raw[8:],
        "length too large": (length + 9).to_bytes(8, "little") + raw[8:],
        "no metadata": packed({k: v for k, v in header.items() if k != "__metadata__"}),
        "metadata a list": packed({**header, "__metadata__": []}),
        "metadata a number": packed({**header, "__metadata__": {"fadapt": 5}}),
        "no checksum": packed(
            {**header, "__metadata__": {"fadapt": header["__metadata__"]["fadapt"]}}
        ),
        "half a character": packed(
            text.replace("sha256", "sha25\\ud800").encode(),
        ),
        "header a list": packed([]),
        "header of brackets": packed(b'{"a":' + b"[" * 100_000),
        "header not UTF-8": packed(b'{"\xff\xfe":1}'),
        "a name twice": packed(
            (text[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}}}").encode()
        ),
        "dtype unknown": entry(dtype="F31"),
        "dtype a list": entry(dtype=[]),
        "dtype C64": entry(dtype="C64"),
        "shape a number": entry(shape=5),
        "shape negative": entry(shape=[-2, -16]),
        "shape of floats": entry(shape=[2.0, 16.0]),
        "shape of bools": entry(shape=[True, 32]),
        "shape too large": entry(shape=[2**40, 2**40]),
        "shape of 10**400": entry(shape=[10**400]),
        "1000 axes": entry(shape=[1] * 1000),
        "offsets reversed": entry(data_offsets=[end, begin]),
        "offsets negative": entry(data_offsets=[-4, end]),
        "offsets beyond": entry(data_offsets=[begin, end + 10**9]),
        "offsets overlap": entry(data_offsets=[0, end - begin])
        if begin
        else entry(data_offsets=[4, end + 4]),
        "offsets of floats": entry(data_offsets=[float(begin), float(end)]),
        "three offsets": entry(data_offsets=[begin, end, end]),
        "no offsets": packed({**header, first: {"dtype": "F32", "shape": []}}),
        "an entry of None": packed({**header, first: None}),
        "bytes after the end": raw + b"x",
        "a byte missing": raw[:-1],
    }


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def huge_files(directory: Path, target: Target, tally: Tally) -> None:
    """Sparse files, which take no room on the disk: nor may they in memory."""
    path, raw = target.path, target.raw
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
    large = copy.deepcopy(header)
    begin = large[last]["data_offsets"][0]
    large[last].update(dtype="F32", shape=[3 << 28], data_offsets=[begin, begin + (3 << 30)])
    meta = json.loads(large["__metadata__"]["fadapt"])
    meta["leaves"][last] = [[3 << 28], "float32"]
    large["__metadata__"]["fadapt"] = json.dumps(meta)
    text = json.dumps(large).encode()
    starts = {
        "zeros": (b"", 3 << 30),
        "zeros, 200 GiB": (b"", 200 << 30),
        "its header and then zeros": (raw, 3 << 30),
        "a header of 90 MB": ((90_000_000).to_bytes(8, "little") + b"{", 3 << 30),
        "a leaf of 3 GiB": (
            len(text).to_bytes(8, "little") + text,
            8 + len(text) + begin + (3 << 30),
        ),
    }
    for name, (start, size) in starts.items():
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(size)
        before = peak_mib()
        end, said = attempt(target.read)
        grown = peak_mib() - before
        if grown > 400:
            end, said = SILENT, f"{grown} MiB more memory"
        tally.add("huge files", name, end, said)
    path.write_bytes(raw)


def attack(tries: int, seed: int = 0, only: str = "") -> Tally:
    """Everything, in a temporary directory."""
    tally, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        targets: dict[str, Target] = {
            "adapters": AdapterFile(directory, "a"),
            "statistics": StatsFile(directory, "s"),
            "plain": PlainFile(directory, "p"),
        }
        crafted = {"adapters": crafted_adapters(), "statistics": crafted_stats()}
        for kind, target in targets.items():
            if only and kind != only:
                continue

            def right(result: Any, target: Target = target) -> bool:
                return target.seen(result) == target.wanted

            for i in range(tries):
                data = damage(target.raw, rng)
                target.path.write_bytes(data)
                tally.add(f"{kind}, damaged", f"{i}", *attempt(target.read, right))
            for what, data in raw_files(target.raw).items():
                target.path.write_bytes(data)
                tally.add(f"{kind}, headers", what, *attempt(target.read, right))
            for what, change in crafted.get(kind, {}).items():
                meta, tensors = copy.deepcopy(target.contents[0]), dict(target.contents[1])
                change(meta, tensors)
                craft(target.path, meta, tensors)
                tally.add(f"{kind}, crafted", what, *attempt(target.read))
            target.path.write_bytes(target.raw)
        if not only:
            huge_files(directory, targets["adapters"], tally)
            huge_files(directory, targets["statistics"], tally)
        left = sorted(set(os.listdir(directory)) - {t.path.name for t in targets.values()})
        assert not left, f"files appeared: {left}"
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=200, help="damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tally = attack(args.tries, args.seed)
    print(tally.table())
    raise SystemExit(bool(tally.bad))


if __name__ == "__main__":
    main()
