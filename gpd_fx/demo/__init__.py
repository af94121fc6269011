"""`gpd-fx demo`: the whole path on real handwritten digits, in a few minutes on a laptop.

A small residual conv net is trained alone and, from the same start, on the same batches in the same order and for as
many updates, together with its dynamic teacher. Each arm takes the learning rate of one small grid that is best on the
validation images; what is compared is measured on test images, by which nothing was chosen. Then the student is
folded, exported to ONNX, and run in ONNX Runtime.
"""

from gpd_fx.demo.command import demo as demo
from gpd_fx.demo.digits import DigitNet as DigitNet
from gpd_fx.demo.show import verdict as verdict
