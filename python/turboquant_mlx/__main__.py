from .commands.program import run

run()
