"""A package, for torch-fidelity installs one of this name, too."""
