"""Rollouts of several turns: the policy calls tools, or a user answers it, and only its own tokens are learnt."""

from fastpost.turns.converse import Conversing, Turns
from fastpost.turns.load import load_turns
from fastpost.turns.tools import Tool, given_tool, load_tool, load_tools

__all__ = ["Conversing", "Tool", "Turns", "given_tool", "load_tool", "load_tools", "load_turns"]
