/*
 * Imports the annotations that `wsi-pipeline segment` wrote into the current image.
 * Script editor: set OUTPUT, then Run > Run for project.
 * Command line:  QuPath script import_annotations.groovy --project P.qpproj --args OUTPUT --save
 *
 * Run it again after another run: what it imported before is replaced. Objects that were unlocked
 * since count as edited by hand and stay.
 */
import static qupath.lib.scripting.QP.*
import qupath.lib.io.GsonTools

String OUTPUT = '/path/to/out'  // the folder given to `segment` as --output

if (binding.hasVariable('args') && args)
    OUTPUT = args[0]
importInto(new File(OUTPUT))

void importInto(File output) {
    def server = getCurrentServer()
    def uris = server.getURIs()
    String path = uris ? uris[0].getPath() : getCurrentImageName()
    String name = path.substring(path.lastIndexOf('/') + 1)
    if (!output.isDirectory()) {
        println "${name}: there is no folder ${output}; set OUTPUT at the top of the script"
        return
    }
    List<File> folders = findRuns(output, path, name)
    if (folders.size() != 1) {
        String found = folders ? "several runs, ${folders*.name.join(', ')}" : 'no run'
        println "${name}: ${found} in ${output}; nothing imported"
        return
    }
    File folder = folders[0]
    Map run = readRun(folder)
    File file = new File(folder, 'annotations.geojson')
    String doubt = whyNot(run, file, server.getWidth(), server.getHeight())
    if (doubt) {
        println "${name}: ${doubt}; nothing imported"
        return
    }
    def hierarchy = getCurrentHierarchy()
    def before = hierarchy.getAllObjects(false)
    def earlier = before.findAll { isOurs(it) && it.isLocked() }
    int edited = before.count { isOurs(it) && !it.isLocked() }
    int count = before.size()
    importObjectsFromFile(file.getPath())  // first: a file that cannot be read costs nothing
    int imported = hierarchy.getAllObjects(false).size() - count
    hierarchy.removeObjects(earlier, true)
    println "${name}: ${imported} objects imported from ${folder.name}, " +
            "${earlier.size()} earlier ones removed, ${edited} unlocked ones kept"
}

/** Returns the folders that hold a run of this image; the path decides where names do not. */
List<File> findRuns(File output, String path, String name) {
    List<File> named = folderNames(name).collect { new File(output, it) }
    String ending = '__' + name + '__'
    named += (output.listFiles() as List).findAll { it.name.contains(ending) }
    List<File> runs = named.unique().findAll { isRunOf(readRun(it), name) }
    if (runs.size() < 2)
        return runs
    List<File> same = runs.findAll { isSamePath(readRun(it).slide.path as String, path) }
    return same ?: runs
}

/** Returns the names that `segment` gives the folder of a slide, most usual first. */
List<String> folderNames(String name) {
    return [stem(name), name].unique()
}

String stem(String name) {
    int dot = name.lastIndexOf('.')
    String stem = dot > 0 && dot < name.length() - 1 ? name.substring(0, dot) : name
    return stem.endsWith('.ome') ? stem.substring(0, stem.length() - 4) : stem
}

Map readRun(File folder) {
    File file = new File(folder, 'run.json')
    return file.isFile() ? GsonTools.getInstance().fromJson(file.getText('UTF-8'), Map) : null
}

/** Returns whether a run is of the slide, or of the patch grid that `tile` made of it. */
boolean isRunOf(Map run, String name) {
    return run != null && run.slide.name in [name, stem(name) + '.zarr']
}

boolean isSamePath(String ofRun, String ofImage) {
    String wanted = ofRun.replace('\\', '/').replaceFirst('^(\\./)+', '')
    return ofImage == wanted || ofImage.endsWith('/' + wanted)
}

/** Returns why a run's polygons must not be imported into an image of this size, or ''. */
String whyNot(Map run, File file, int width, int height) {
    if (run.status != 'done')
        return "its run failed (${run.reason})"
    if (!file.isFile())
        return "its run has no ${file.name}"
    Map bounds = run.slide.bounds
    boolean cropped = run.frame.for == 'qupath' && bounds != null
    List size = cropped ? [bounds.width, bounds.height] : run.slide.size
    size = size.collect { it as int }
    if (size != [width, height])
        return "the image is ${width} x ${height} px here and ${size.join(' x ')} px in the run; " +
                "was it cropped, rotated or resized, or is --for the other one?"
    return ''
}

boolean isOurs(pathObject) {
    // cells have no name; asking them for metadata would make QuPath hold some for each
    return pathObject.getName() && pathObject.getMetadata()['software']?.startsWith('wsi_pipeline')
}
