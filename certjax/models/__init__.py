"""Model families. One folder each: `config`, `modeling`, pure functions over a parameter tree."""
