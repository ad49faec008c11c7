"""Drives CMake and Ninja: the CPU part wherever there is a C++ compiler, the CUDA part wherever there is nvcc.

    NTM_CUDA=auto    the default: build the CUDA part where nvcc is found; where that fails, record why and go on
    NTM_CUDA=1       fail when the CUDA part cannot be built
    NTM_CUDA=0       do not build it
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX", or CMAKE_CUDA_ARCHITECTURES or CUDAARCHS as CMake reads them
                     the architectures to build it for; "all" is the full list, for a wheel
    CXX, CUDACXX, CUDA_HOME
                     the compilers, where PATH does not lead to them

Without a list of architectures, the CUDA part is built for the GPUs that nvidia-smi shows. Where it shows none, the
build holds PTX alone: it serves every GPU from compute capability 7.5 on, and the driver compiles it for the GPU at
the first launch, once.

pip hides what a build prints, so ntm_fast/_build.json keeps what was built and, for what was not, the reason:
``ntm-fast info`` shows it.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# The full list: a cubin for each generation, which serves its later minors too, and PTX of the newest for what comes.
# The first is the oldest that is supported. Its PTX serves all of them; nothing in csrc asks for a newer one.
ARCHITECTURES = ("75", "80", "90", "100", "120")
NVIDIA_SMI_SECONDS = 10  # it may hang where a driver is ill
# The environment that CMake and the compilers listen to: a build folder is reused only where it is the same.
ENVIRONMENT = re.compile(r"CMAKE_|CXX|CUDA|NVCC_|CPATH|CPLUS_|LIBRARY_PATH|LDFLAGS|PATH$|SDKROOT|MACOSX_")


class CommandFailed(Exception):
    """A command went wrong; the text is what it printed."""


def run(*command) -> str:
    """Run a command, print what it printed and return it."""
    command = [str(word) for word in command]
    print("+", shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise CommandFailed(f"{command[0]}: {error.strerror}") from error
    print(done.stdout, flush=True)
    if done.returncode:
        raise CommandFailed(done.stdout)
    return done.stdout


def cause(output: str) -> str:
    """A build's output from the first line on that names an error, else its end; a few lines."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.search(r"\berror\b|\bfatal\b|not found", line, re.IGNORECASE)]
    return "\n".join(lines[errors[0] :][:12] if errors else lines[-12:])


def version_line(compiler: str) -> str:
    """How a compiler names itself, or why it does not."""
    try:
        lines = run(*shlex.split(compiler), "--version").splitlines()
    except CommandFailed as error:
        return f"{compiler}: {error}"
    return next((line for line in lines if "release" in line), lines[0])  # nvcc says it in the fourth line


def find_cxx() -> str | None:
    """The C++ compiler that CMake would take, by CMake's own order."""
    if "CXX" in os.environ:
        return os.environ["CXX"] if shutil.which(shlex.split(os.environ["CXX"])[0]) else None
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc() -> str | None:
    """nvcc: named, on PATH, in a toolkit's usual place, or from PyPI's nvidia packages in this environment."""
    if "CUDACXX" in os.environ:
        return os.environ["CUDACXX"]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    installed = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*"), reverse=True)
    places = [
        *(Path(home, "bin") for home in homes),
        None,
        "/usr/local/cuda/bin",
        *(home / "bin" for home in installed),
    ]
    return next(filter(None, (shutil.which("nvcc", path=place and str(place)) for place in places)), None)


def visible_gpus() -> list[str]:
    """The compute capabilities of this machine's GPUs, such as "90"; none where nvidia-smi does not answer.

    nvidia-smi asks the driver without initialising CUDA. Where it hangs, it is left behind.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return []
    try:
        answer, _ = asked.communicate(timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        asked.kill()  # and no wait for its end: a process that hangs in the driver cannot be killed
        return []
    return sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", answer, re.M)}, key=int)


def listed_architectures(name: str, value: str) -> list[str]:
    """What an environment variable lists, in CMake's words: each either -real (a cubin) or -virtual (PTX)."""
    found = []
    for item in re.split(r"[\s;,]+", value):
        # torch writes 9.0a+PTX for a cubin with PTX, CMake 90a for the same and 90a-real for the cubin alone.
        torch_like = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        cmake_like = re.fullmatch(r"(\d{2,3}[af]?)(-real|-virtual)?", item)
        if torch_like:
            major, minor, ptx = torch_like.groups()
            found += [f"{major}{minor}-real"] + [f"{major}{minor}-virtual"] * bool(ptx)
        elif cmake_like:
            number, kind = cmake_like.groups()
            found += [number + kind] if kind else [f"{number}-real", f"{number}-virtual"]
        else:
            raise CompileError(
                f"{name}={value}: '{item}' is not an architecture such as 9.0, 9.0+PTX or 90-real; 'all' alone is the "
                "full list"
            )
    return list(dict.fromkeys(found))


def cuda_architectures(nvcc: str) -> list[str]:
    """CMake's list of architectures: the one asked for, else that of the visible GPUs, else PTX for all."""
    names = ("CMAKE_CUDA_ARCHITECTURES", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST")
    asked = {name: os.environ[name].strip() for name in names if os.environ.get(name, "").strip()}
    name, value = next(iter(asked.items()), (None, ""))
    if name and value.lower() != "all":
        return listed_architectures(name, value)
    known = run(nvcc, "--list-gpu-arch").split()
    supported = [number for number in ARCHITECTURES if f"compute_{number}" in known]
    if not supported:
        raise CommandFailed(f"{nvcc} knows none of the architectures {', '.join(ARCHITECTURES)}: {' '.join(known)}")
    if name:
        return [f"{number}-real" for number in supported] + [f"{supported[-1]}-virtual"]
    visible = [number for number in visible_gpus() if int(number) >= int(supported[0])]
    cubins = [f"{number}-real" for number in visible if f"compute_{number}" in known]
    if cubins and len(cubins) == len(visible):
        return cubins
    return [*cubins, f"{supported[0]}-virtual"]  # PTX also serves a GPU that is too new for this nvcc


def tool(name: str) -> str:
    """cmake or ninja: the one that its PyPI package brought, which need not be on PATH, else the one on PATH."""
    try:
        module = __import__(name)
        found = shutil.which(name, path=getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR)
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if not found:
        raise CompileError(f"building ntm_fast needs {name}: pip install {name}")
    return found


def sources_digest() -> str:
    """Of everything that is compiled; ntm_fast._native compares it before it borrows another copy's build."""
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


class BuildFresh(build):
    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)  # or an earlier build's files would be packed too
        super().run()


class BuildNative(build_ext):
    def run(self):
        cuda = os.environ.get("NTM_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise CompileError(f"NTM_CUDA={cuda}: must be auto, 1 or 0")
        in_place = self.inplace or getattr(self, "editable_mode", False)
        self.target = ROOT / "ntm_fast" if in_place else Path(self.build_lib, "ntm_fast").resolve()
        self.cmake_folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{'in-place' if in_place else 'wheel'}"

        record = {"version": self.distribution.get_version(), "sources": sources_digest()}
        record |= {"python": sys.version.split()[0], "cpu": [], "cpu_reason": None, "cuda": None, "cuda_reason": None}
        cxx = find_cxx()
        if os.name == "nt":
            record["cpu_reason"] = record["cuda_reason"] = "native parts are not built on Windows"
        elif cxx is None:
            named = f" (CXX={os.environ['CXX']} is no program)" if "CXX" in os.environ else ""
            record["cpu_reason"] = record["cuda_reason"] = (
                f"no C++ compiler was found{named} when ntm_fast was installed: install one, g++ for example, and "
                "install ntm_fast again"
            )
        else:
            record["cxx"] = version_line(cxx)
            self.build_cpu(cxx, record)
            self.build_cuda(cxx, cuda, record)
        if cuda == "1" and not record["cuda"]:
            raise CompileError(f"NTM_CUDA=1, but the CUDA part was not built: {record['cuda_reason']}")
        self.install(record)

    def install(self, record: dict):
        """Replace what an earlier build left in the package, only now that this one has succeeded."""
        self.target.mkdir(parents=True, exist_ok=True)
        binding = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        for stale in (*self.target.glob("ntm_*.so"), self.target / binding, self.target / "_build.json"):
            stale.unlink(missing_ok=True)
        for part in ("cpu", "cuda"):
            if record[part]:
                run(tool("cmake"), "--install", self.cmake_folder / part)
        text = json.dumps(record, indent=2)
        print(text)
        (self.target / "_build.json").write_text(text + "\n")

    def build_cpu(self, cxx: str, record: dict):
        import pybind11

        try:
            self.cmake(
                "cpu", cxx, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"
            )
        except CommandFailed as error:
            raise CompileError(f"the C++ part of ntm_fast could not be built:\n{cause(str(error))}") from None
        names = {"baseline": "baseline", "v3": "x86-64-v3", "v4": "x86-64-v4"}  # a compiler may not know the later ones
        built = {path.name for path in (self.cmake_folder / "cpu").glob("ntm_cpu_*.so")}
        record["cpu"] = [name for short, name in names.items() if f"ntm_cpu_{short}.so" in built]

    def build_cuda(self, cxx: str, wanted: str, record: dict):
        if wanted == "0":
            record["cuda_reason"] = "ntm_fast was installed with NTM_CUDA=0: install it again without"
            return
        nvcc = find_nvcc()
        if nvcc is None:
            record["cuda_reason"] = (
                "no nvcc was found when ntm_fast was installed: install a CUDA toolkit, or its compiler alone with "
                "'pip install \"cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]\"', and install ntm_fast again"
            )
            return
        record["nvcc"] = version_line(nvcc)
        try:
            architectures = ";".join(cuda_architectures(nvcc))
            self.cmake("cuda", cxx, f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
            record["cuda"] = architectures.replace("-real", "")
        except CommandFailed as error:
            record["cuda_reason"] = f"the CUDA part could not be built with {nvcc}: {cause(str(error))}"
            print("warning:", record["cuda_reason"], file=sys.stderr)

    def cmake(self, part: str, cxx: str, *options: str):
        """Configure and build one part."""
        folder, ninja = self.cmake_folder / part, tool("ninja")
        configure = [tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-DNTM_PART={part}", f"-DCMAKE_INSTALL_PREFIX={self.target}", *options]
        # Objects of an earlier build are used again only where nothing differs that could change them.
        environment = {name: value for name, value in sorted(os.environ.items()) if ENVIRONMENT.search(name)}
        configuration = json.dumps([[str(word) for word in configure], version_line(cxx), environment], indent=1)
        stamp = folder / "configuration.json"
        if not stamp.exists() or stamp.read_text() != configuration:
            shutil.rmtree(folder, ignore_errors=True)
        run(*configure)
        stamp.write_text(configuration)
        # What compilers said of each object when it was last compiled; at the end, what sources all of them are of.
        with open(folder / "build.log", "a") as log:
            try:
                log.write(run(tool("cmake"), "--build", folder))
                log.write(f"sources {sources_digest()}\n")
            except CommandFailed as error:
                log.write(str(error))
                raise


setup(
    ext_modules=[Extension("ntm_fast._C", sources=[])],  # marks the wheel as native; CMake builds it
    cmdclass={"build": BuildFresh, "build_ext": BuildNative},
)
