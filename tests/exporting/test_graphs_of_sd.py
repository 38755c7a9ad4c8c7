"""UNets of Stable Diffusion students as graphs: writing one compares it with the model at two sizes and batches."""

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from bilevel_fast.exporting import graphs
from bilevel_fast.exporting.parts import parts
from bilevel_fast.models.folder import load_folder


@pytest.mark.slow
@pytest.mark.parametrize(("student", "write"), [("narrow", graphs.write_torch), ("narrow_xl", graphs.write_onnx)])
def test_unets_of_students(request, tmp_path, student, write):
    """Any units of everything and some layers gone, of 2.1 and of XL; an ONNX file is made of a torch program."""
    assert write(parts(load_folder(request.getfixturevalue(student)))[0], tmp_path) < 1e-4
