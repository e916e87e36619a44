#!/usr/bin/env bash
# README's walk as a newcomer takes it: a user, a HOME and a clone of their own, no cache, no variable of ours. As root, with git,
# make, a C++ compiler, curl and Python >= 3.11 (PYTHON=...) installed for all users; 22 minutes on two cores.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
user=newcomer$$
useradd --create-home "$user"
home=$(getent passwd "$user" | cut -d: -f6)
trap 'kill -KILL $(ps --no-headers -o pid -u "$user") 2>/dev/null || true; sleep 2; userdel --remove "$user" 2>/dev/null || true' EXIT
git clone --quiet "$root" "$home/geodistill"
chown --recursive "$user" "$home/geodistill"

# what README tells to type, and how long it took
walk() {
    local start=$SECONDS
    echo "\$ $1"
    runuser --user "$user" -- env --ignore-environment HOME="$home" USER="$user" PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 \
        bash -euo pipefail -c "cd ~/geodistill; $1"
    echo "== $((SECONDS - start)) s"
}

walk "make demo ${PYTHON:+PYTHON=$PYTHON}"
walk 'cat runs/demo/README.md; test -s runs/demo/report.html'
walk 'make demo'  # everything is skipped
walk 'make doctor'
walk '.venv/bin/python jobs/export.py --config configs/demo.yaml'
walk '.venv/bin/python -c "from pathlib import Path; from geodistill.benchmarks.scene import write_scene; write_scene(Path(\"scene.tif\"), 600)"
.venv/bin/python jobs/predict.py --config configs/demo.yaml predict.scenes=scene.tif "predict.questions=[\"[refer] where is <p>building</p>?\"]"'
walk 'make serve > serve.log 2>&1 & served=$!
for _ in $(seq 120); do curl --silent --fail http://127.0.0.1:8000/ready && break; sleep 1; done
curl --silent --fail http://127.0.0.1:8000/ | grep --quiet "<title>"
curl --silent --fail http://127.0.0.1:8000/v1/models
image=$(curl --silent http://127.0.0.1:8000/samples | .venv/bin/python -c "import json, sys; print(json.load(sys.stdin)[0][\"url\"])")
text="{\"type\": \"text\", \"text\": \"What is the class of this scene? Answer the question using a single word or phrase.\"}"
case $image in data:*) ;; *) image="data:image/png;base64,$(curl --silent "http://127.0.0.1:8000/$image" | base64 --wrap=0)";; esac
picture="{\"type\": \"image_url\", \"image_url\": {\"url\": \"$image\"}}"
echo "{\"model\": \"student\", \"messages\": [{\"role\": \"user\", \"content\": [$picture, $text]}]}" > question.json
curl --silent --fail --header "Content-Type: application/json" --data @question.json http://127.0.0.1:8000/v1/chat/completions
kill -TERM $served; wait $served || true'
echo "the newcomer has arrived after $((SECONDS / 60)) minutes"
