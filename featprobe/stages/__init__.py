"""The work of the commands: the only place where backbones, data sets, caches, probes and reports meet."""
