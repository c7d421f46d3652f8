#!/usr/bin/env bash
# What the test of `ghostmask report` in a browser needs: Debian's Chromium, and Playwright, which drives it, in .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${1:-.venv/bin/python}
"$PYTHON" -c 'import playwright' 2>/dev/null || "$PYTHON" -m pip install -q -c constraints.txt "playwright>=1.50"
for browser in chromium chromium-browser google-chrome; do
    if command -v "$browser" >/dev/null; then exit 0; fi
done
echo "browser: installing chromium (a minute)"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq </dev/null >/dev/null
apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 chromium </dev/null >/dev/null
