"""Workflows: the QuPath scripts find the folders that `segment` makes, run it, and import once.

QuPath itself is not at hand. The scripts run in a real Groovy against the few classes of its API
that they use, whose signatures and behaviour were read in QuPath 0.5.1, 0.6.0 and 0.7.0; or, where
`QUPATH_JARS` tells their class path, against QuPath's own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import shapely
from bundles import pointwise_bundle

from wsi_pipeline import evaluate, load_run, plan_jobs, segment
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
        String name, pathClass
        boolean locked
        boolean annotation = true
        Map<String, String> metadata = [:]
        def ROI
    }
    static class Area {
        List rings
        boolean isArea() { true }
    }
    static class Hierarchy {
        List<PathObject> objects = []
        Collection<PathObject> getAllObjects(boolean includeRoot) { new ArrayList(objects) }
        boolean removeObjects(Collection<PathObject> gone, boolean keepChildren) {
            objects.removeAll { o -> gone.any { it.is(o) } }
        }
    }
    static class Server {
        String uri
        int width, height
        Collection<URI> getURIs() { [new URI(uri)] }
    }
    static Hierarchy hierarchy = new Hierarchy()
    static List<PathObject> selected = []
    static Server server
    static final String PROJECT_BASE_DIR = '{%PROJECT}'
    static Object getProject() { null }
    static Server getCurrentServer() { server }
    static Hierarchy getCurrentHierarchy() { hierarchy }
    static String getCurrentImageName() { 'unused' }
    static Collection<PathObject> getAllObjects(boolean includeRoot) {
        hierarchy.getAllObjects(includeRoot)
    }
    static Collection<PathObject> getSelectedObjects() { selected as LinkedHashSet }
    static Collection<PathObject> getAnnotationObjects() {
        hierarchy.objects.findAll { it.annotation }
    }
    static void exportObjectsToGeoJson(
        Collection<PathObject> objects, String path, String option, String... more
    ) {
        def features = objects.collect {
            [type: 'Feature',
             properties: it.pathClass ? [classification: [name: it.pathClass]] : [:],
             geometry: [type: 'Polygon', coordinates: it.ROI.rings]]
        }
        def whole = groovy.json.JsonOutput.toJson([type: option, features: features])
        new File(path).setText(whole.replace('FEATURE_COLLECTION', 'FeatureCollection'), 'UTF-8')
    }
    static boolean importObjectsFromFile(String path) {
        def read = new groovy.json.JsonSlurper().parseText(new File(path).getText('UTF-8'))
        hierarchy.objects += read.features.collect {
            new PathObject(name: it.properties.name, locked: it.properties.isLocked,
                metadata: it.properties.metadata, pathClass: it.properties.classification.name,
                ROI: new Area(rings: it.geometry.coordinates))
        }
        true
    }
}
""",
    "Stage.groovy": """
import qupath.lib.scripting.QP
class Stage {
    static void show(String uri, List size) {
        QP.server = new QP.Server(uri: uri, width: size[0], height: size[1])
    }
    static void startWith(String name) {
        QP.hierarchy.objects = [new QP.PathObject(name: name, locked: true, pathClass: 'Ignore*')]
        QP.selected = []
    }
    static void draw(List ring, String className, boolean select) {
        def drawn = new QP.PathObject(ROI: new QP.Area(rings: [ring]), pathClass: className)
        QP.hierarchy.objects << drawn
        QP.selected = select ? [drawn] : []
    }
}
""",
}
# The same in QuPath itself, whose class path QUPATH_JARS is.
QUPATH = {
    "Stage.groovy": """
import java.awt.image.BufferedImage
import qupath.lib.images.ImageData
import qupath.lib.images.servers.*
import qupath.lib.objects.*
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs
import qupath.lib.scripting.QP
class Stage {
    static class Shown extends AbstractTileableImageServer {
        URI uri
        ImageServerMetadata metadata
        Shown(String uri, List size) {
            this.uri = new URI(uri)
            metadata = new ImageServerMetadata.Builder(Shown, uri, *size)
                .name('unused').rgb(true).build()
        }
        protected BufferedImage readTile(TileRequest tile) { null }
        protected ImageServerBuilder.ServerBuilder<BufferedImage> createServerBuilder() { null }
        protected String createID() { uri }
        Collection<URI> getURIs() { [uri] }
        String getServerType() { 'Stage' }
        ImageServerMetadata getOriginalMetadata() { metadata }
    }
    static hierarchy
    static void show(String uri, List size) {
        def data = new ImageData(new Shown(uri, size), hierarchy)
        QP.setBatchProjectAndImage(null, data)
    }
    static void startWith(String name) {
        hierarchy = new qupath.lib.objects.hierarchy.PathObjectHierarchy()
        def roi = ROIs.createRectangleROI(0, 0, 9, 9, ImagePlane.getDefaultPlane())
        def kind = PathClass.fromString('Ignore*')
        hierarchy.addObject(PathObjects.createAnnotationObject(roi, kind))
        hierarchy.getAllObjects(false)[0].with { it.name = name; it.locked = true }
    }
    static void draw(List ring, String className, boolean select) {
        def (x, y) = ring.transpose()
        def roi = ROIs.createPolygonROI(x as double[], y as double[], ImagePlane.getDefaultPlane())
        def kind = className ? PathClass.fromString(className) : null
        def drawn = PathObjects.createAnnotationObject(roi, kind)
        hierarchy.addObject(drawn)
        hierarchy.getSelectionModel().setSelectedObject(select ? drawn : null)
    }
}
"""
}
DRIVER = """
import qupath.lib.scripting.QP
def steps = new groovy.json.JsonSlurper().parseText(new File(args[0]).getText('UTF-8'))
def answers = steps.collect { step ->
    def said = new StringWriter()
    def binding = new Binding([args: step.args as String[], out: new PrintWriter(said, true)])
    def script = new GroovyShell(this.class.classLoader, binding).parse(new File(step.script))
    if (step.names)
        return step.names.collect { script.folderNames(it) }
    if (step.fresh)
        Stage.startWith('Drawn by hand')
    Stage.show(step.uri, step.size)
    if (step.draw)
        Stage.draw(step.draw, step.drawn_as, step.select as boolean)
    if (step.unlock)
        QP.getCurrentHierarchy().getAllObjects(false).find { it.name == step.unlock }
            .setLocked(false)
    def error = ''
    try { script.run() } catch (Exception e) { error = e.toString() }
    def objects = QP.getCurrentHierarchy().getAllObjects(false)
    [said: said.toString().trim(), names: objects*.getName().sort(), error: error]
}
new File(args[1]).setText(groovy.json.JsonOutput.toJson(answers), 'UTF-8')
"""


@pytest.fixture(scope="module")
def in_groovy(tmp_path_factory):
    """Return `in_groovy(steps)`, which runs scripts step by step and returns what each did.

    In Groovy's own program against the stand-in, or in QuPath's classes where `QUPATH_JARS` is the
    class path of one, as `/opt/QuPath/lib/app/*`.
    """
    jars = os.environ.get("QUPATH_JARS")
    groovy, java = shutil.which("groovy"), shutil.which("java")
    if not java or not (groovy or jars):
        pytest.skip("no groovy on this machine (apt-get install groovy)")
    folder = tmp_path_factory.mktemp("groovy")
    for name, text in (QUPATH if jars else API).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    (folder / "driver.groovy").write_text(DRIVER, "utf-8")
    env = {"JAVA_HOME": str(Path(java).resolve().parents[1]), **os.environ}
    start = [java, "-cp", f"{folder}:{jars}", "groovy.ui.GroovyMain"]

    def run(steps):
        asked, answered = folder / "steps.json", folder / "answers.json"
        whole = [{"script": str(SCRIPT), "args": [step.get("output")], **step} for step in steps]
        asked.write_text(json.dumps(whole), "utf-8")
        start_here = start if jars else [groovy, "-cp", folder]
        done = subprocess.run(
            [*start_here, folder / "driver.groovy", asked, answered],
            env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(answered.read_text("utf-8"))

    return run


@pytest.fixture(scope="module")
def output(tmp_path_factory, slide_path):
    """Return the output folder of a real run of `slide_path`."""
    folder = tmp_path_factory.mktemp("output")
    bundle = pointwise_bundle(folder / "model", mpp=0.5)
    (run,) = segment(
        slide_path, model=bundle, output=folder / "out", tissue="none", outputs=("geojson",)
    )
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
    last = names[-1]
    first, again, edited = in_groovy([{**step, "fresh": True}, step, {**step, "unlock": last}])
    assert first["names"] == again["names"] == sorted(["Drawn by hand", *names])
    said = f"synthetic slide.tif: {len(names)} objects imported from synthetic slide, "
    assert first["said"] == said + "0 earlier ones removed, 0 unlocked ones kept"
    assert again["said"] == said + f"{len(names)} earlier ones removed, 0 unlocked ones kept"
    assert edited["said"] == said + f"{len(names) - 1} earlier ones removed, 1 unlocked ones kept"
    assert edited["names"] == sorted(["Drawn by hand", last, *names])


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


RUN = WORKFLOWS / "qupath" / "run_on_image.groovy"
PROGRAM = str(Path(sys.executable).with_name("wsi-pipeline"))


@pytest.fixture
def on_image(tmp_path, slide_path):
    """Return a step that segments `slide_path` from QuPath, and the folder of its runs."""
    model = pointwise_bundle(tmp_path / "model", mpp=0.5)
    output = tmp_path / "runs of QuPath"
    args = [PROGRAM, str(model), str(output), "--tissue", "none", "--outputs", "geojson"]
    step = {"script": str(RUN), "args": args, "uri": slide_path.as_uri(), "size": [1931, 1487]}
    return step, output


@pytest.mark.slow
def test_an_image_is_segmented_and_what_a_run_imported_is_replaced(in_groovy, on_image):
    step, output = on_image
    region = {"draw": [[100, 100], [900, 100], [900, 800], [100, 800], [100, 100]]}
    whole, again, inside, marked = in_groovy(
        [
            {**step, "fresh": True},
            step,
            {**step, **region, "select": True},
            {**step, **region, "fresh": True, "drawn_as": "Region*"},
        ]
    )
    assert not whole["error"] + again["error"] + inside["error"] + marked["error"]
    count = len(whole["names"]) - 1
    assert count > 1
    assert again["names"] == whole["names"]
    assert "segmenting the whole image" in whole["said"]
    assert f"{count} objects imported, 0 earlier ones removed" in whole["said"]
    assert f"{count} objects imported, {count} earlier ones removed" in again["said"]
    for answer in (inside, marked):
        assert "segmenting 1 annotations" in answer["said"]
    assert f"{count} earlier ones removed" in inside["said"]
    # the polygons that the run in the region wrote, beside the region and what was drawn before
    features = load_features(output / "synthetic slide" / "annotations.geojson")
    names = [feature["properties"]["name"] for feature in features]
    drawn = [None, "Drawn by hand"]
    assert sorted(marked["names"], key=str) == sorted([*drawn, *names], key=str)
    assert sorted(inside["names"], key=str) == sorted(marked["names"], key=str)
    box = shapely.box(100, 100, 900, 800)
    assert all(box.covers(shapely.geometry.shape(f["geometry"])) for f in features)


def load_features(path):
    return json.loads(path.read_text("utf-8"))["features"]


@pytest.mark.slow
def test_two_slides_of_one_name_share_no_folder(
    in_groovy, on_image, slide_path, slide_pixels, make_slide, tmp_path
):
    step, output = on_image
    other = tmp_path / "elsewhere" / slide_path.name
    other.parent.mkdir()
    make_slide(other, slide_pixels[::-1], 0.25, levels=(1, 4))
    second = {**step, "uri": other.as_uri(), "fresh": True}
    _, beside, again, _ = in_groovy([{**step, "fresh": True}, second, second, step])
    assert "0 earlier ones removed" in beside["said"]
    assert len(beside["names"]) > 1
    assert again["names"] == beside["names"]
    (home,) = output.glob("elsewhere-*/synthetic slide")
    runs = [load_run(folder).slide["path"] for folder in (output / "synthetic slide", home)]
    assert runs == [str(slide_path), str(other)]
    script = WORKFLOWS / "qupath" / "send_corrections.groovy"
    send = {"script": str(script), "args": [str(output)], "drawn_as": "Region*"}
    send["draw"] = [[100, 100], [900, 100], [900, 800], [100, 800], [100, 100]]
    _, sent = in_groovy([second, {**second, **send}])
    assert "areas sent to" in sent["said"]
    assert (home.parent / "corrections" / "synthetic slide.geojson").is_file()
    assert not (output / "corrections").exists()


@pytest.mark.slow
def test_progress_of_the_run_is_told(in_groovy, on_image):
    (answer,) = in_groovy([{**on_image[0], "fresh": True}])
    assert re.search(r"unused: 100 % \(\d+ of \d+ patches\)", answer["said"])


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_image_as_it_was(in_groovy, on_image, slide_path):
    step, _ = on_image
    args = step["args"]
    ran, no_program, no_model, no_file, resized = in_groovy(
        [
            {**step, "fresh": True},
            {**step, "args": ["/nowhere/wsi-pipeline", *args[1:]]},
            {**step, "args": [args[0], "/nowhere/model", *args[2:]]},
            {**step, "uri": "https://example.org/a.svs"},
            {**step, "size": [1487, 1931]},
        ]
    )
    assert "cannot run PROGRAM" in no_program["said"]
    assert "/nowhere/model" in no_model["said"]
    assert "no file of this machine" in no_file["said"]
    assert "another size" in resized["said"]
    for answer in (no_program, no_model, no_file, resized):
        assert not answer["error"]
        assert "objects imported" not in answer["said"]
        # what an earlier run brought stays as well
        assert answer["names"] == ran["names"]


@pytest.mark.slow
def test_corrections_are_sent_where_evaluate_takes_them(in_groovy, output, slide_path):
    step = {"script": str(WORKFLOWS / "qupath" / "send_corrections.groovy"), "args": [str(output)]}
    step |= {"uri": slide_path.as_uri(), "size": [1931, 1487]}
    square = [[100, 100], [900, 100], [900, 800], [100, 800], [100, 100]]
    imported = {**step, "script": str(SCRIPT)}
    _, undrawn, resized, sent, nameless = in_groovy(
        [
            {**imported, "fresh": True},
            step,
            {**step, "size": [1487, 1931]},
            {**step, "draw": square, "drawn_as": "Region*"},
            {**step, "draw": square},
        ]
    )
    assert "draw an annotation of the class Region*" in undrawn["said"]
    assert "1 areas have no class" in nameless["said"]
    assert "another size" in resized["said"]
    file = output / "corrections" / "synthetic slide.geojson"
    assert f"areas sent to {file}" in sent["said"]
    figures = evaluate(output / "synthetic slide", file)
    # the run's own polygons, which nobody has changed, within the region
    (slide,) = figures["slides"]
    assert slide["accuracy"] > 0.99
    assert sum(map(sum, slide["confusion"])) == pytest.approx(800 * 700, rel=0.01)


OPENED = """
import java.awt.image.BufferedImage
import qupath.lib.projects.ProjectIO
import qupath.lib.scripting.QP
new qupath.lib.images.servers.ImageServers()
def project = ProjectIO.loadProject(new File(args[0]), BufferedImage)
def found = project.getImageList().collect { entry ->
    def data = entry.readImageData()
    QP.setBatchProjectAndImage(project, data)
    def script = new File(new File(args[0]).parentFile, 'scripts/import_annotations.groovy')
    2.times { new GroovyShell(this.class.classLoader, new Binding()).evaluate(script) }
    def server = data.getServer()
    [entry.getImageName(), server.getWidth(), server.getHeight(), server.getServerType(),
     data.getHierarchy().getAllObjects(false).collect {
        [it.getName(), it.getPathClass().toString(), it.getROI().getArea(), it.getMeasurements()]
     }]
}
new File(args[1]).setText(groovy.json.JsonOutput.toJson(found), 'UTF-8')
"""


def test_a_project_of_runs_has_its_slides_and_their_polygons(slide_path, tmp_path):
    model = pointwise_bundle(tmp_path / "model", mpp=0.5)
    options = {"tissue": "none", "outputs": ("geojson", "zarr")}
    (run,) = segment(slide_path, model=model, output=tmp_path / "out", **options)
    folder, home = tmp_path / "project", tmp_path / "out" / slide_path.stem
    export = [PROGRAM, "export", home, "--qupath-project"]
    subprocess.run([*export, folder], check=True)
    project = json.loads((folder / "project.qpproj").read_text("utf-8"))
    (image,) = project["images"]
    assert image["serverBuilder"]["uri"] == slide_path.as_uri()
    assert image["serverBuilder"]["args"] == []
    copied = folder / "data" / "1" / "annotations.geojson"
    assert copied.read_bytes() == (home / "annotations.geojson").read_bytes()
    again = subprocess.run([*export, folder], capture_output=True, text=True)
    assert again.returncode == 1
    assert "name a new one" in again.stderr
    # Of nothing there is no project, and no traceback.
    (home / "run.json").rename(tmp_path / "kept.json")
    (home / "run.json").write_text("{}")
    none = tmp_path / "none"
    failed = subprocess.run([*export, none], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert not none.exists()
    (tmp_path / "kept.json").replace(home / "run.json")
    whole = tmp_path / "whole"
    subprocess.run([*export, whole, "--for", "openslide"], check=True)
    (image,) = json.loads((whole / "project.qpproj").read_text("utf-8"))["images"]
    assert image["serverBuilder"]["args"] == ["--no-crop"]
    if not (jars := os.environ.get("QUPATH_JARS")):
        return
    (tmp_path / "opened.groovy").write_text(OPENED, "utf-8")
    for place in (folder, whole):
        asked = [tmp_path / "opened.groovy", place / "project.qpproj", tmp_path / "found.json"]
        command = ["java", "-cp", jars, "groovy.ui.GroovyMain", *asked]
        subprocess.run(command, check=True)
        ((name, width, height, reader, objects),) = json.loads(asked[-1].read_text("utf-8"))
        expected = [slide_path.name, *run.slide["size"], "OpenSlide"]
        assert [name, width, height, reader] == expected
        features = load_features(place / "data" / "1" / "annotations.geojson")
        assert len(objects) == len(features) > 1
        for (called, kind, area, measured), feature in zip(objects, features, strict=True):
            told = feature["properties"]
            assert [called, kind] == [told["name"], told["classification"]["name"]]
            assert area == pytest.approx(shapely.geometry.shape(feature["geometry"]).area)
            assert measured == pytest.approx(told["measurements"], rel=1e-6)
