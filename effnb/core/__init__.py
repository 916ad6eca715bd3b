"""What the methods share: named modules, calibration, outliers, training. It knows no method."""
