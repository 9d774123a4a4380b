"""From labelled text to a calibrated safety head: collect, features, train, calibrate, report."""
