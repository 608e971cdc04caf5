"""What the commands do: the only place where backbones, data sets, caches, probes and reports meet."""
