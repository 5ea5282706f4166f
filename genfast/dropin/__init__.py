"""Drop-in samplers: one module (or package) per peer project, with the peer's own names and signatures."""
