"""How a command line becomes a training: settings of .env, family, launcher, workflows of Olive.

Modules are imported by their full names, without lazy_loader, because `help` is shown before any package is
installed. Nothing here imports torch or diffusers before it is called.
"""
