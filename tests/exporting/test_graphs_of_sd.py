"""UNets of Stable Diffusion students as graphs: writing one compares it with the model at two sizes and batches."""

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from bilevel_fast.exporting import graphs
from bilevel_fast.exporting.parts import parts
from bilevel_fast.models.folder import load_folder
from unets import random_structure


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "write"), [("sd21", graphs.write_torch), ("xl", graphs.write_onnx)])
def test_unets_of_students(request, make_student, tmp_path, teacher, write):
    """Any units, of 2.1 and of XL; an ONNX file is made of a torch program, and takes its time for each operation: most
    layers are gone, and what is left is every kind once or twice."""
    path = request.getfixturevalue(teacher)
    student = make_student(path, random_structure(load_folder(path).config, seed=1, drop=0.6))
    assert write(parts(load_folder(student))[0], tmp_path) < 1e-4
