"""The engine: which tokens run next (pure Python), and the runner that computes them."""
