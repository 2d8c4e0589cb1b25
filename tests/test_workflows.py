"""Workflows: the QuPath script parses, finds the folders that `segment` makes, and imports once.

QuPath itself is not at hand. The script runs in a real Groovy against the few classes of its API
that it uses, whose signatures and behaviour were read in QuPath 0.5.1, 0.6.0 and 0.7.0.
"""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import pointwise_bundle

from wsi_pipeline import (
    ExportOptions,
    PredictOptions,
    ScheduleOptions,
    SelectOptions,
    Settings,
    load_bundle,
    load_run,
    open_cluster,
    plan_jobs,
    segment,
)
from wsi_pipeline.report.record import write_run_json

WORKFLOWS = Path(__file__).parents[1] / "workflows"
SCRIPT = WORKFLOWS / "qupath" / "import_annotations.groovy"
API = {
    "qupath/lib/io/GsonTools.groovy": """
package qupath.lib.io
class GsonTools {
    static GsonTools getInstance() { new GsonTools() }
    Object fromJson(String text, Class type) {
        def doubles  // Gson reads every number of a Map as a double
        doubles = { it instanceof Map ? it.collectEntries { k, v -> [k, doubles(v)] }
            : it instanceof List ? it.collect(doubles) : it instanceof Number ? it as double : it }
        doubles(new groovy.json.JsonSlurper().parseText(text))
    }
}
""",
    "qupath/lib/scripting/QP.groovy": """
package qupath.lib.scripting
class QP {
    static class PathObject {
        String name
        boolean locked
        Map<String, String> metadata = [:]
    }
    static class Hierarchy {
        List<PathObject> objects = []
        Collection<PathObject> getAllObjects(boolean includeRoot) { new ArrayList(objects) }
        void removeObjects(Collection<PathObject> gone, boolean keepChildren) {
            objects.removeAll { o -> gone.any { it.is(o) } }
        }
    }
    static class Server {
        String uri
        int width, height
        Collection<URI> getURIs() { [new URI(uri)] }
    }
    static Hierarchy hierarchy = new Hierarchy()
    static Server server
    static void startWith(String name) {
        hierarchy.objects = [new PathObject(name: name, locked: true)]
    }
    static void show(String uri, List size) {
        server = new Server(uri: uri, width: size[0], height: size[1])
    }
    static Server getCurrentServer() { server }
    static Hierarchy getCurrentHierarchy() { hierarchy }
    static String getCurrentImageName() { 'unused' }
    static boolean importObjectsFromFile(String path) {
        def read = new groovy.json.JsonSlurper().parseText(new File(path).getText('UTF-8'))
        hierarchy.objects += read.features.collect {
            new PathObject(name: it.properties.name, locked: it.properties.isLocked,
                metadata: it.properties.metadata)
        }
        true
    }
}
""",
}
DRIVER = """
import qupath.lib.scripting.QP
def steps = new groovy.json.JsonSlurper().parseText(new File(args[1]).getText('UTF-8'))
def answers = steps.collect { step ->
    def said = new StringWriter()
    def binding = new Binding([args: [step.output] as String[], out: new PrintWriter(said, true)])
    def script = new GroovyShell(this.class.classLoader, binding).parse(new File(args[0]))
    if (step.names)
        return step.names.collect { script.folderNames(it) }
    if (step.fresh)
        QP.startWith('Drawn by hand')
    if (step.unlock)
        QP.hierarchy.objects[-1].locked = false
    QP.show(step.uri, step.size)
    def error = ''
    try { script.run() } catch (Exception e) { error = e.toString() }
    [said: said.toString().trim(), names: QP.hierarchy.objects*.name, error: error]
}
new File(args[2]).setText(groovy.json.JsonOutput.toJson(answers), 'UTF-8')
"""


@pytest.fixture(scope="module")
def in_groovy(tmp_path_factory):
    """Return `in_groovy(steps)`, which runs the script step by step and returns what each did."""
    groovy, java = shutil.which("groovy"), shutil.which("java")
    if not groovy or not java:
        pytest.skip("no groovy on this machine (apt-get install groovy)")
    folder = tmp_path_factory.mktemp("groovy")
    for name, text in API.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    (folder / "driver.groovy").write_text(DRIVER, "utf-8")
    env = {"JAVA_HOME": str(Path(java).resolve().parents[1]), **os.environ}

    def run(steps):
        asked, answered = folder / "steps.json", folder / "answers.json"
        asked.write_text(json.dumps(steps), "utf-8")
        command = [groovy, "-cp", folder, folder / "driver.groovy", SCRIPT, asked, answered]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(answered.read_text("utf-8"))

    return run


@pytest.fixture(scope="module")
def output(tmp_path_factory, slide_path):
    """Return the output folder of a real run of `slide_path`."""
    folder = tmp_path_factory.mktemp("output")
    bundle = load_bundle(pointwise_bundle(folder / "model", mpp=0.5))
    settings = Settings(
        select=SelectOptions(tissue="none"),
        predict=PredictOptions(device="cpu", precision="fp32"),
        export=ExportOptions(outputs=("geojson",)),
    )
    (job,) = plan_jobs([slide_path], folder / "out")
    with open_cluster(ScheduleOptions()) as client:
        run = segment(job, bundle, client=client, settings=settings, threads=1)
    assert sum(run.regions.values()) > 1
    return folder / "out"


def copy_run(output, target, path, **slide):
    """Copy the run as if it were of the slide at `path`."""
    shutil.copytree(output / "synthetic slide", target)
    run = load_run(target / "run.json")
    told = {**run.slide, "name": Path(path).name, "path": path, **slide}
    write_run_json(target / "run.json", replace(run, slide=told))


def test_folders_are_named_as_segment_names_them(in_groovy):
    names = ["a.svs", "a b.c.tif", "x.ome.tif", "x.OME.TIFF", "Ünï.ndpi", "noext", ".hidden.svs"]
    (answers,) = in_groovy([{"names": names}])
    for name, folders in zip(names, answers, strict=True):
        path = Path("slides", name)
        (alone,) = plan_jobs([path], Path("out"))
        assert folders[0] == alone.folder.name
        clash = path.with_name(f"{alone.folder.name}.other")
        together = {job.path: job.folder.name for job in plan_jobs([path, clash], Path("out"))}
        assert together[path] == folders[-1]


def test_annotations_are_imported_once_however_often_it_runs(in_groovy, output, slide_path):
    step = {"output": str(output), "uri": slide_path.as_uri(), "size": [1931, 1487]}
    features = json.loads((output / "synthetic slide" / "annotations.geojson").read_text("utf-8"))
    names = [feature["properties"]["name"] for feature in features["features"]]
    first, again, edited = in_groovy([{**step, "fresh": True}, step, {**step, "unlock": True}])
    assert first["names"] == again["names"] == ["Drawn by hand", *names]
    said = f"synthetic slide.tif: {len(names)} objects imported from synthetic slide, "
    assert first["said"] == said + "0 earlier ones removed, 0 unlocked ones kept"
    assert again["said"] == said + f"{len(names)} earlier ones removed, 0 unlocked ones kept"
    assert edited["said"] == said + f"{len(names) - 1} earlier ones removed, 1 unlocked ones kept"
    assert edited["names"] == ["Drawn by hand", names[-1], *names]


def test_what_does_not_fit_is_told_and_nothing_is_imported(in_groovy, output, slide_path, tmp_path):
    step = {"uri": slide_path.as_uri(), "size": [1931, 1487], "fresh": True}
    (tmp_path / "out" / "synthetic slide").mkdir(parents=True)  # without a run
    copy_run(output, tmp_path / "out" / "synthetic slide.tif", str(slide_path))
    (tmp_path / "out" / "synthetic slide.tif" / "annotations.geojson").write_text("{]", "utf-8")
    copy_run(output, tmp_path / "bare" / "synthetic slide", str(slide_path))
    (tmp_path / "bare" / "synthetic slide" / "annotations.geojson").unlink()
    absent, unknown, resized, bare, damaged = in_groovy(
        [
            {**step, "output": str(tmp_path / "absent")},
            {**step, "output": str(output), "uri": "file:/slides/another%20one.svs"},
            {**step, "output": str(output), "size": [1487, 1931]},
            {**step, "output": str(tmp_path / "bare")},
            {**step, "output": str(tmp_path / "out")},
        ]
    )
    assert "set OUTPUT" in absent["said"]
    assert unknown["said"].startswith("another one.svs: no run in")
    assert "1487 x 1931 px here and 1931 x 1487 px in the run" in resized["said"]
    assert "its run has no annotations.geojson" in bare["said"]
    assert damaged["error"]
    for answer in (absent, unknown, resized, bare, damaged):
        assert answer["names"] == ["Drawn by hand"]
        assert answer["said"].count("\n") == 0


def test_slides_of_one_name_get_each_its_own_run(in_groovy, output, tmp_path):
    slides = [tmp_path / "p1" / "a.svs", tmp_path / "p2" / "a.svs"]
    for job in plan_jobs(slides, tmp_path / "out"):
        copy_run(output, job.folder, str(job.path))
    step = {"output": str(tmp_path / "out"), "size": [1931, 1487], "fresh": True}
    answers = in_groovy([{**step, "uri": path.as_uri()} for path in [*slides, Path("/p3/a.svs")]])
    assert "imported from p1__a.svs__" in answers[0]["said"]
    assert "imported from p2__a.svs__" in answers[1]["said"]
    assert "several runs" in answers[2]["said"]


def test_a_crop_to_the_bounds_is_expected_where_the_run_made_it(in_groovy, output, tmp_path):
    bounds = {"x": 100, "y": 50, "width": 1500, "height": 1200}
    copy_run(output, tmp_path / "a", "/slides/a.mrxs", bounds=bounds)
    step = {"output": str(tmp_path), "uri": "file:/slides/a.mrxs", "fresh": True}
    cropped, whole = in_groovy([{**step, "size": [1500, 1200]}, {**step, "size": [1931, 1487]}])
    assert "objects imported" in cropped["said"]
    assert "1500 x 1200 px in the run" in whole["said"]


def test_every_workflow_is_listed_and_explained():
    listed = (WORKFLOWS / "README.md").read_text("utf-8")
    folders = [path for path in WORKFLOWS.iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        assert f"({folder.name}/README.md)" in listed
        assert (folder / "README.md").is_file()
