"""Owns what `degas doctor` says of a CPU's compiled operations: whose they are, what they multiply, what torch does. Main thread."""

from __future__ import annotations

from collections.abc import Iterator

Line = tuple[str, str, str]
"""Name, text, and advice; empty where there is nothing to do."""


def kernel_lines() -> Iterator[Line]:
    """What a CPU worker here will compute by; loads the library if it is there, compiles nothing."""
    from worker.config import default_threads
    from worker.native.build import find_compiler
    from worker.native.kernels_in_use import kernels_in_use

    found, compiler = kernels_in_use(), find_compiler()
    kind = found.instructions or "none of those there are kinds for"
    if not found.library:
        if compiler is None:
            yield (
                "operations",
                "no C++ compiler: on a CPU, torch alone, a third to a half as fast",
                "install g++ or clang, if models run on this CPU",
            )
        else:
            yield (
                "operations",
                f"{compiler} compiles them for this processor ({kind}) at a CPU worker's first start",
                "",
            )
        return
    yield "operations", f"{found.library}, for this processor's kind: {kind}", ""
    for dtype, formats in found.products.items():
        yield "products", f"{dtype} activations by weights in {', '.join(formats)}", ""
    if not found.products:
        yield "products", "torch's alone: the library has none for this processor", ""
    yield "threads", f"{default_threads()} of the library's own, torch's 1 (setting threads)", ""
    widths = ", ".join(map(str, found.heads))
    yield "by torch", f"sampling, attention within pictures, heads of widths other than {widths}", ""
