"""The toolbox: callbacks with one concern each, known to no other part of minifast."""
