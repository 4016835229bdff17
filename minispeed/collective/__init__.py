"""Talk to the other ranks: `group` is the language, threads and processes carry it, `launch` starts it."""
