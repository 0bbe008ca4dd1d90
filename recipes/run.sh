#!/bin/sh
# bash recipes/run.sh NAME [--field value ...]: the stages of a recipe in their order; the flags go to every stage.
set -eu
name=$1
shift
[ -d runs/sums ] || python recipes/make_data.py runs/sums
for config in recipes/"$name"/*.yaml; do
    stage=$(basename "$config" .yaml)
    verb=${stage#*-}
    echo "fastpost $verb --config $config $*"
    fastpost "$verb" --config "$config" "$@"
done
python recipes/score.py runs/"$name"/*
