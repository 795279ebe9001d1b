"""The colours of all figures, by Okabe and Ito, "Color universal design" (2008): distinguishable with every common colour blindness."""

BLUE, SKY, ORANGE, RED, GREEN, PINK = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7"
INK, GREY, PALE = "#22303C", "#626D78", "#E4E8EC"
PRIORITY = "#A3356F"
