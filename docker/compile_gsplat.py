"""Compile gsplat's CUDA kernels into the installed package, so that where it runs needs no compiler.

`CUDA_ARCHITECTURES=8.6 python docker/compile_gsplat.py`. gsplat is published as source that compiles itself at first
use; what it looks for first is `gsplat.csrc`, and that is what this makes. nvcc comes as a wheel of the release that
torch is made with, and is taken away again with what else was only needed here. No GPU is needed. For Python of one
version only, so run it with the interpreter that shall use it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NAME = "csrc"
# Of the wheels that make up CUDA, those that only a compiler needs.
COMPILER = ("nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-nvvm")


def main() -> None:
    architectures = os.environ["CUDA_ARCHITECTURES"].split()
    if not all(re.fullmatch(r"\d+\.\d[a-f]?(\+PTX)?", name) for name in architectures):
        sys.exit(f"CUDA_ARCHITECTURES={' '.join(architectures)} is no list such as '8.6 9.0+PTX'")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "install", f"cuda-toolkit[cccl,nvcc]=={importlib.metadata.version('cuda-toolkit')}"], check=True
    )
    try:
        compile_kernels(architectures)
    finally:
        subprocess.run([*pip, "uninstall", "--yes", *COMPILER], check=True)


def compile_kernels(architectures: list[str]) -> None:
    packages = Path(sysconfig.get_path("purelib"))
    gsplat, toolkit = packages / "gsplat", next((packages / "nvidia").glob("cu[0-9]*"))
    with tempfile.TemporaryDirectory() as folder:
        # A wheel's libraries lie in `lib` under their full names; a linker looks for short ones in `lib64`.
        home = Path(folder, "cuda")
        home.mkdir()
        for entry in toolkit.iterdir():
            (home / entry.name).symlink_to(entry)
        (home / "lib64").mkdir()
        for library in (toolkit / "lib").glob("lib*.so.*"):
            (home / "lib64" / f"{library.name.partition('.so')[0]}.so").symlink_to(library)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja's wheel is there
        os.environ |= {"PATH": path, "CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": ";".join(architectures)}
        from torch.utils import cpp_extension  # reads the environment when it is imported

        build = Path(folder, "build")
        build.mkdir()
        sources = [*sorted((gsplat / "cuda/csrc").glob("*.cu")), *sorted((gsplat / "cuda/csrc").glob("*.cpp"))]
        cpp_extension.load(
            NAME,
            [str(source) for source in (*sources, gsplat / "cuda/ext.cpp")],
            extra_cflags=["-O3", "-Wno-attributes"],
            extra_cuda_cflags=["-O3", "-use_fast_math"],
            extra_include_paths=[str(gsplat / "cuda/include"), str(gsplat / "cuda/csrc/third_party/glm")],
            build_directory=str(build),
            is_python_module=False,
            verbose=True,
        )
        shutil.copy(build / f"{NAME}.so", gsplat / f"{NAME}.so")


if __name__ == "__main__":
    main()
