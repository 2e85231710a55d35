"""Lists of computed steps that papers tuned by hand. Pure data."""

L2P_STEPS = 50
L2P_LISTS = {  # arXiv 2604.26365, released code; by the interval that the paper calls each after
    5: (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    6: (0, 1, 2, 4, 7, 14, 23, 31, 38, 45),
    7: (0, 1, 2, 4, 9, 17, 26, 35, 43),
    8: (0, 1, 2, 4, 10, 20, 31, 41),
    10: (0, 1, 2, 4, 12, 24, 38),
    16: (0, 1, 2, 4, 16, 32),
}

SPECTRUM_ALPHAS = (0.75, 3.0)  # arXiv 2603.01623: growth of the window, at about 3.5 and 5 times the speed
