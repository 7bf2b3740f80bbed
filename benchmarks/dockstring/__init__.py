"""Docking scores of molecules: DOCKSTRING with the Tanimoto kernel."""
