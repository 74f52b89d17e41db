"""Mixtures of experts: dense models put side by side, their routers made, measured and calibrated; experts matched."""
