"""Code that runs before PyTorch is imported: programs, `.env`, secrets, resolvers, targets, checks of arguments.

It imports no heavy packages, so that `--help`, shell completion and errors about misspelt keys appear at once, and
imports `vitrail` only when a command is about to run. Nothing is imported here: `import vitrail` needs `errors` and
`checking`, which must not load Hydra.
"""
