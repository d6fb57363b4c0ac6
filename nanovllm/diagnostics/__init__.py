"""Instruments: what a checkpoint holds, where two computations part, what a run did and what it spent its time on."""
