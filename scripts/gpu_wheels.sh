#!/bin/sh
# Put what the machine with the GPU may lack into wheels/, on a machine with a network: Python 3.12 on x86-64 Linux.
# scripts/gpu_campaign.sh installs from there what is missing. No NVIDIA library and no PyTorch: those are there.
# More packages may be named: scripts/gpu_wheels.sh scipy
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
MOST_MB=60

rm -rf wheels
# Without dependencies: those of nvidia-cutlass would bring CUDA's Python bindings, which nothing here imports.
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux_2_12_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 \
  -c constraints.txt -d wheels \
  pydantic pydantic_core annotated-types typing_extensions typing-inspection \
  psutil nvidia-cutlass nvidia-ml-py \
  click jinja2 MarkupSafe pyyaml rich markdown-it-py mdurl Pygments pytest pluggy iniconfig packaging "$@"

mb=$(du -sm wheels | cut -f1)
if [ "$mb" -gt "$MOST_MB" ]; then
  echo "wheels: found $mb MB, expected at most $MOST_MB" >&2
  exit 2
fi
echo "wheels: $(find wheels -name '*.whl' | wc -l) of them, $mb MB"
