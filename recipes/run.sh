#!/bin/sh
# bash recipes/run.sh NAME [--field value ...]: the stages of a recipe in their order; the flags go to every stage.
# A recipe with data of its own, and a score, has make_data.py and score.py in its folder.
set -eu
name=$1
shift
[ -d runs/sums ] || python recipes/make_data.py runs/sums
if [ -f recipes/"$name"/make_data.py ] && [ ! -d runs/"$name"/data ]; then
    python recipes/"$name"/make_data.py runs/"$name"/data
fi
for config in recipes/"$name"/[0-9]-*.yaml; do
    stage=$(basename "$config" .yaml)
    verb=${stage#*-}
    echo "fastpost $verb --config $config $*"
    fastpost "$verb" --config "$config" "$@"
done
score=recipes/score.py
[ ! -f recipes/"$name"/score.py ] || score=recipes/"$name"/score.py
python "$score" runs/"$name"/*
