#!/usr/bin/env bash
# Makes the model of mini.toml, mini-chat.toml and mini-adapt.toml from nothing: data, ids, three trainings, one folder.
# Some four hours on one core of a CPU; the same command goes on where it was stopped. Needs espeak-ng and flite.
#   bash examples/recipes/mini.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
mmpt() { "${PYTHON:-.venv/bin/python}" -m mmpt "$@"; }

for set in emoji prompts handbook voices; do
  [ -e "build/$set" ] || mmpt data prepare "$set" --out "build/$set"
done
[ -e build/gridworld ] || mmpt data prepare gridworld num_episodes=7500 --out build/gridworld
[ -e build/instructions ] || mmpt data prepare instructions --out build/instructions
mmpt encode build/gridworld/*.tar --out build/mini
mmpt encode build/{emoji,prompts,handbook,voices}/*.tar --augment --out build/mini
mmpt encode build/instructions/*.tar --out build/mini-chat
mmpt train examples/recipes/mini.toml --out runs/mini
mmpt train examples/recipes/mini-chat.toml --out runs/mini-chat
mmpt adapt examples/recipes/mini-adapt.toml --out runs/mini-dida
mmpt export runs/mini-dida --average --out "${1:-runs/mini-model}"
