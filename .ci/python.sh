#!/bin/sh
# Prints the path of a Python that can build .venv: 3.12 or newer, with venv and ensurepip. Every candidate is run and
# asked, because a name on PATH proves nothing (a pyenv shim exists for versions that are not selected, and fails).
# $PYTHON, when set, is tried first. Versions that the pinned jax has wheels for (3.12 to 3.14) win over newer ones.

probe='
import sys
if sys.version_info < (3, 12): sys.exit("old")
try:
    import ensurepip, venv
except ImportError:
    print("no-venv", sys.executable)
else:
    print("tested" if sys.version_info < (3, 15) else "newer", sys.executable)
'
ask() { "$1" -c "$probe" </dev/null 2>/dev/null; }

if [ -n "$PYTHON" ]; then
    case $(ask "$PYTHON") in
        tested\ * | newer\ *) ask "$PYTHON" | cut -d ' ' -f 2-; exit 0 ;;
    esac
    echo "PYTHON=$PYTHON is not a Python >= 3.12 with the venv module; looking for another" >&2
fi

newer='' old='' no_venv=''
for name in python3.14 python3.13 python3.12 python3 python "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do
    answer=$(ask "$name")
    path=${answer#* }
    case $answer in
        tested\ *) echo "$path"; exit 0 ;;
        newer\ *) newer=${newer:-$path} ;;
        no-venv\ *) no_venv=${no_venv:-$path} ;;
        *) version=$("$name" --version 2>&1 </dev/null) && old="$old  $name is $version
" ;;
    esac
done
if [ -n "$newer" ]; then
    echo "$newer is newer than what optx is tested with (3.12 to 3.14); trying it" >&2
    echo "$newer"
    exit 0
fi

{
    echo "optx needs Python 3.12 or newer with the venv module, and there is none on this machine."
    [ -z "$old" ] || printf 'Found, but too old:\n%s' "$old"
    [ -z "$no_venv" ] || printf 'Found, but without venv and ensurepip (apt-get install python3-venv):\n  %s\n' "$no_venv"
    echo "Ways to get one:"
    echo "  Debian 13, Ubuntu 24.04   sudo apt-get install python3 python3-venv"
    echo "  Fedora                    sudo dnf install python3.12"
    echo "  macOS                     brew install python@3.12"
    echo "  pyenv                     pyenv install 3.12"
    echo "  uv                        uv python install 3.12 && make setup PYTHON=\"\$(uv python find 3.12)\""
    echo "If it is there under another name: make setup PYTHON=/path/to/python"
} >&2
exit 1
