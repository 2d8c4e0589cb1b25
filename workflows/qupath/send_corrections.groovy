/*
 * Sends what was corrected in the current image to where `evaluate` and `train` take it as truth:
 * OUTPUT/corrections/<slide>.geojson.
 * Draw an annotation of the class Region* around what you have looked at. In it all that has a class
 * is the truth, whoever drew it, and the rest is background: correct, delete and add there.
 * Script editor: set OUTPUT, then Run, or Run > Run for project.
 * Command line:  QuPath script send_corrections.groovy --project P.qpproj --args OUTPUT
 */
import static qupath.lib.scripting.QP.*
import qupath.lib.io.GsonTools

String OUTPUT = ''  // folder of the runs; '' = wsi_pipeline in the project's folder

if (binding.hasVariable('args') && args)
    OUTPUT = args[0]
if (!OUTPUT && getProject() != null)
    OUTPUT = buildFilePath(PROJECT_BASE_DIR, 'wsi_pipeline')
println "${getCurrentImageName()}: ${send(new File(OUTPUT))}"

/** Sends the corrections of the current image; returns what to say of it. */
String send(File output) {
    def server = getCurrentServer()
    String path = server.getURIs().find { it.scheme == 'file' }?.path
    // Of slides of one file name the second has its run, and its corrections, one folder further down.
    List<File> folders = (output.listFiles() ?: []).collectMany { [it, *(it.listFiles() ?: [])] }
            .findAll { isRunOf(readRun(it), path) }
    if (folders.size() != 1)
        return "${folders.size()} runs of this image in ${output}; expected one"
    Map run = readRun(folders[0])
    Map bounds = run.slide.bounds
    List size = run.frame.for == 'qupath' && bounds ? [bounds.width, bounds.height] : run.slide.size
    if (size.collect { it as int } != [server.getWidth(), server.getHeight()])
        return 'the run is of an image of another size; was it cropped, rotated or resized?'
    Collection areas = getAllObjects(false).findAll { it.getROI()?.isArea() }
    if (!areas.any { it.getPathClass()?.toString() == 'Region*' })
        return 'nothing is sent: draw an annotation of the class Region* around what you have corrected'
    int nameless = areas.count { it.getPathClass() == null }
    if (nameless)
        return "nothing is sent: ${nameless} areas have no class; give them one, Ignore* where none fits"
    File file = new File(folders[0].parentFile, "corrections/${folders[0].name}.geojson")
    file.parentFile.mkdirs()
    exportObjectsToGeoJson(areas, file.path, 'FEATURE_COLLECTION')
    return "${areas.size()} areas sent to ${file}"
}

Map readRun(File folder) {
    File file = new File(folder, 'run.json')
    return file.isFile() ? GsonTools.getInstance().fromJson(file.getText('UTF-8'), Map) : null
}

boolean isRunOf(Map run, String path) {
    String told = run?.slide?.path?.replace('\\', '/')?.replaceFirst('^(\\./)+', '')
    return told && path && (path == told || path.endsWith('/' + told))
}
