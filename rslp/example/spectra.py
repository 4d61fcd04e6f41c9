"""Reflectance of surfaces in the bands of Sentinel-2 and Landsat 8/9.

Typical values, rounded by hand to what such surfaces show; nothing here is a measurement.
"""

from __future__ import annotations

import numpy as np

from rslp.example.scene import Array

# Both in the order in which the encoder's pre-training reads them.
S2_BANDS = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")
LANDSAT_BANDS = ("B8", "B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11")
S1_BANDS = ("vv", "vh")

_WAVES = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
# nm:                443   490   560   665   705   740   783   842   865   945   1610  2190
_S2 = {
    "leaf": (0.025, 0.030, 0.065, 0.032, 0.100, 0.310, 0.395, 0.420, 0.440, 0.430, 0.200, 0.090),
    "straw": (0.070, 0.095, 0.145, 0.190, 0.225, 0.250, 0.275, 0.300, 0.315, 0.310, 0.400, 0.290),
    "blossom": (0.045, 0.060, 0.190, 0.185, 0.230, 0.340, 0.390, 0.420, 0.440, 0.430, 0.220, 0.100),
    "soil": (0.065, 0.085, 0.120, 0.160, 0.180, 0.195, 0.210, 0.230, 0.245, 0.250, 0.320, 0.275),
    "water": (0.048, 0.050, 0.046, 0.030, 0.026, 0.018, 0.017, 0.015, 0.013, 0.012, 0.006, 0.004),
    "roof": (0.110, 0.130, 0.150, 0.190, 0.205, 0.215, 0.225, 0.235, 0.240, 0.245, 0.280, 0.260),
    "asphalt": (0.080, 0.090, 0.100, 0.110, 0.115, 0.120, 0.125, 0.130, 0.135, 0.135, 0.150, 0.140),
    "conifer": (0.016, 0.019, 0.034, 0.021, 0.050, 0.135, 0.170, 0.190, 0.200, 0.200, 0.090, 0.040),
    "broadleaf": (0.018, 0.022, 0.052, 0.026, 0.085, 0.270, 0.350, 0.375, 0.390, 0.380, 0.165, 0.070),
    "twigs": (0.040, 0.050, 0.065, 0.080, 0.100, 0.125, 0.145, 0.165, 0.180, 0.185, 0.210, 0.150),
    "shrub": (0.028, 0.034, 0.060, 0.045, 0.100, 0.215, 0.260, 0.285, 0.300, 0.300, 0.215, 0.115),
    "cloud": (0.600, 0.600, 0.600, 0.610, 0.620, 0.630, 0.640, 0.650, 0.650, 0.480, 0.430, 0.330),
}


def s2(*names: str) -> Array:
    """Return the spectra of surfaces, ``N C``, bands in the order of ``S2_BANDS``."""
    order = [_WAVES.index(band) for band in S2_BANDS]
    return np.array([[_S2[name][k] for k in order] for name in names])


# Top of the atmosphere, surface part; the optical bands of LANDSAT_BANDS (all but the thermal ones).
# band:             B8     B1     B2     B3     B4     B5     B6     B7     B9
_LANDSAT = {
    "sea": (0.022, 0.034, 0.033, 0.024, 0.012, 0.006, 0.003, 0.002, 0.001),
    "silt": (0.075, 0.060, 0.070, 0.085, 0.070, 0.022, 0.004, 0.003, 0.001),
    "foam": (0.330, 0.320, 0.330, 0.330, 0.320, 0.270, 0.090, 0.050, 0.010),
    "glint": (0.100, 0.095, 0.097, 0.100, 0.102, 0.105, 0.104, 0.100, 0.010),
    "white": (0.480, 0.440, 0.460, 0.480, 0.480, 0.460, 0.420, 0.380, 0.020),
    "rust": (0.165, 0.090, 0.095, 0.115, 0.205, 0.260, 0.300, 0.280, 0.010),
    "grey": (0.200, 0.175, 0.180, 0.190, 0.205, 0.220, 0.230, 0.220, 0.010),
    "steel": (0.240, 0.170, 0.180, 0.220, 0.265, 0.300, 0.340, 0.360, 0.010),
    "rock": (0.130, 0.080, 0.090, 0.115, 0.140, 0.200, 0.240, 0.190, 0.008),
    "green": (0.060, 0.040, 0.045, 0.070, 0.050, 0.320, 0.170, 0.080, 0.006),
    "cloud": (0.480, 0.470, 0.470, 0.480, 0.490, 0.520, 0.360, 0.260, 0.030),
}
# Light scattered by the air itself, same bands.
AIR = np.array([0.045, 0.098, 0.074, 0.043, 0.024, 0.010, 0.004, 0.003, 0.001])


def landsat(*names: str) -> Array:
    """Return the spectra of surfaces, ``N C``, the nine optical bands of ``LANDSAT_BANDS``."""
    return np.array([_LANDSAT[name] for name in names])


def mix(fractions: Array, spectra: Array) -> Array:
    """Mix surfaces linearly.

    Args:
        fractions: ``N T H W``, share of each surface in a pixel.
        spectra: ``N C``.

    Returns:
        Reflectance, ``T C H W``.
    """
    # Plain einsum on purpose: BLAS would start threads in every worker process for a matter of microseconds.
    return np.asarray(np.einsum("nthw,nc->tchw", fractions, spectra))
