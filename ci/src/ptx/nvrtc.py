"""Compiles a CUDA source to PTX with the NVRTC of this virtual environment: nvrtc.py SOURCE OUT OPTION..."""

import ctypes
import glob
import os
import sys


def main(source: str, out: str, options: list[str]) -> None:
    places = [os.path.join(place, "nvidia/cuda_nvrtc/lib/libnvrtc.so.*") for place in sys.path]
    found = [path for place in places for path in glob.glob(place)]
    if not found:
        sys.exit("this Python has no nvidia-cuda-nvrtc wheel")
    nvrtc = ctypes.CDLL(found[0])

    def call(name: str, *arguments: object) -> int:
        return getattr(nvrtc, name)(*arguments)

    def text(kind: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{kind}", program, buffer)
        return buffer.value

    program = ctypes.c_void_p()
    with open(source, "rb") as file:
        code = file.read()
    if call("nvrtcCreateProgram", ctypes.byref(program), code, source.encode(), 0, None, None) != 0:
        sys.exit("nvrtcCreateProgram failed")
    given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    result = call("nvrtcCompileProgram", program, len(options), given)
    log = text("ProgramLog").decode().strip()
    if log:
        print(log, file=sys.stderr)
    if result != 0:
        sys.exit(f"{source} does not compile")
    with open(out, "wb") as file:
        file.write(text("PTX"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
