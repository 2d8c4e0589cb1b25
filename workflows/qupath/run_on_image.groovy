/*
 * Segments the current image with wsi-pipeline and imports the polygons.
 * Where: in the selected annotations; else in those of class Region*; else in the whole image.
 * Script editor: set PROGRAM and MODEL, then Run, or Run > Run for project.
 * Command line:  QuPath script run_on_image.groovy --project P.qpproj --save
 *                    --args PROGRAM --args MODEL [--args OUTPUT [--args OPTION ...]]
 *
 * Run it again: what it imported before is replaced. Objects that were unlocked since count as
 * edited by hand and stay, as does all that was never ours.
 */
import static qupath.lib.scripting.QP.*
import qupath.lib.io.GsonTools

String PROGRAM = '/path/to/bin/wsi-pipeline'  // C:/path/to/Scripts/wsi-pipeline.exe on Windows
String MODEL = '/path/to/models/lightmuseg-bcss-demo'
String OUTPUT = ''  // folder for the runs; '' = wsi_pipeline in the project's folder
List<String> OPTIONS = []  // more of `segment`, such as ['--min-area', '1000', '--simplify', '2']

if (binding.hasVariable('args') && args) {
    List<String> given = args as List
    PROGRAM = given[0]
    MODEL = given[1] ?: MODEL
    OUTPUT = given[2] ?: OUTPUT
    OPTIONS = given.drop(3)
}
if (!OUTPUT && getProject() != null)
    OUTPUT = buildFilePath(PROJECT_BASE_DIR, 'wsi_pipeline')
segment(PROGRAM, MODEL, OUTPUT, OPTIONS)

void segment(String program, String model, String output, List<String> options) {
    String name = getCurrentImageName()
    def server = getCurrentServer()
    File slide = fileOf(server)
    if (slide == null || !output) {
        println "${name}: " + (output ? 'is no file of this machine' : 'set OUTPUT: there is no project')
        return
    }
    // Slides of one file name, as those of DICOM often have, do not share a folder.
    if (isOfAnother(new File(output, stem(slide.name)), slide))
        output = new File(output, "${slide.parentFile.name}-${Integer.toHexString(slide.path.hashCode())}").path
    def asked = call([program, 'info', '--json', slide.path, *readingOf(options)]) { null }
    if (asked.code != 0) {
        println "${name}: ${asked.last}"
        return
    }
    String frame = frameOf(readJson(asked.out), server.getWidth(), server.getHeight())
    if (!frame) {
        println "${name}: the file has another size than the image here; was it cropped, rotated or resized?"
        return
    }
    List<String> command = [program, 'segment', slide.path, '--model', model, '--output', output,
                            '--for', frame, *options]
    Collection regions = regionsOf(getSelectedObjects(), getAnnotationObjects())
    if (regions) {
        // It stays, since `wsi-pipeline verify` asks for it.
        File region = new File(output, stem(slide.name) + '.region.geojson')
        region.parentFile.mkdirs()
        exportObjectsToGeoJson(regions, region.path, 'FEATURE_COLLECTION')
        command += ['--roi', region.path]
    }
    println "${name}: segmenting ${regions ? regions.size() + ' annotations' : 'the whole image'}"
    File file = new File(new File(output, stem(slide.name)), 'run.json')
    String before = file.isFile() ? file.getText('UTF-8') : ''
    int told = 0
    def done = call(command) { String line ->
        def counted = line =~ /(\d+)%\|.*?\| (\d+)\/(\d+)/
        if (!counted.find())
            return println("${name}: ${line}")
        if ((counted.group(1) as int) >= told + 5) {
            told = counted.group(1) as int
            println "${name}: ${told} % (${counted.group(2)} of ${counted.group(3)} patches)"
        }
    }
    // Unreadable parts make an exit code of 1, too; what an earlier call has left is not to be taken.
    String now = file.isFile() ? file.getText('UTF-8') : ''
    Map run = now && (done.code == 0 || now != before) ? readJson(now) : [status: 'missing']
    if (run.status != 'done') {
        println "${name}: nothing imported"
        return
    }
    importFrom(name, file.parentFile, run)
}

/** Returns the file that an image is read from; null = it is not one of this machine. */
File fileOf(server) {
    URI uri = server.getURIs().find { it.scheme == 'file' }
    // on Windows a share of another machine: file://server/share/slide.svs
    return uri == null ? null : new File(uri.authority ? "//${uri.authority}${uri.path}" : uri.path)
}

/** Returns whether a folder holds the run of another slide, which is still where it was. */
boolean isOfAnother(File folder, File slide) {
    File file = new File(folder, 'run.json')
    String told = file.isFile() ? readJson(file.getText('UTF-8')).slide?.path : null
    return told && new File(told).exists() && new File(told).canonicalFile != slide.canonicalFile
}

/** Returns the options that `info` needs as well to read the slide as `segment` does. */
List<String> readingOf(List<String> options) {
    return ['--mpp', '--series'].collectMany { option ->
        int i = options.indexOf(option)
        i < 0 ? [] : options.subList(i, i + 2)
    }
}

/** Returns whose origin the image has, as `--for` names it; '' = the image is not the whole slide. */
String frameOf(Map slide, int width, int height) {
    List size = [width, height]
    Map bounds = slide.bounds
    if (bounds != null && size == [bounds.width as int, bounds.height as int])
        return 'qupath'
    if (size != slide.size.collect { it as int })
        return ''
    return bounds == null ? 'qupath' : 'openslide'
}

/** Returns the areas to which the run is limited; none = there are no limits. */
Collection regionsOf(Collection selected, Collection annotations) {
    Collection areas = selected.findAll { it.isAnnotation() && it.getROI()?.isArea() }
    return areas ?: annotations.findAll { it.getPathClass()?.toString() == 'Region*' && it.getROI().isArea() }
}

String stem(String name) {
    int dot = name.lastIndexOf('.')
    String stem = dot > 0 && dot < name.length() - 1 ? name.substring(0, dot) : name
    return stem.endsWith('.ome') ? stem.substring(0, stem.length() - 4) : stem
}

Map readJson(String text) {
    return GsonTools.getInstance().fromJson(text, Map)
}

/** Runs a command, never in a shell; returns its exit code, what it wrote, and the last it said. */
Map call(List<String> command, Closure tell) {
    File out = File.createTempFile('wsi-pipeline', '.txt')
    ProcessBuilder builder = new ProcessBuilder(command.collect { it.toString() }).redirectOutput(out)
    builder.environment().putAll([PYTHONUTF8: '1', TQDM_MININTERVAL: '1'])
    Process process
    try {
        process = builder.start()
    } catch (IOException e) {
        out.delete()
        return [code: -1, out: '', last: "cannot run PROGRAM: ${e.message}"]
    }
    // QuPath that is closed, or a script that is stopped, ends the run; the next goes on with it.
    Thread ender = new Thread({ process.destroy() } as Runnable)
    Runtime.runtime.addShutdownHook(ender)
    String last = ''
    try {
        Scanner lines = new Scanner(process.errorStream, 'UTF-8').useDelimiter('[\\r\\n]+')
        while (lines.hasNext()) {
            last = lines.next()
            tell(last)
            if (Thread.currentThread().isInterrupted())
                throw new InterruptedException('stopped')
        }
        return [code: process.waitFor(), out: out.getText('UTF-8'), last: last]
    } finally {
        process.destroy()
        Runtime.runtime.removeShutdownHook(ender)
        out.delete()
    }
}

void importFrom(String name, File folder, Map run) {
    // A file that somebody has edited keeps its name; the new one has another.
    String written = run.files.keySet().find { it.startsWith('annotations') && it.endsWith('.geojson') }
    def hierarchy = getCurrentHierarchy()
    def before = hierarchy.getAllObjects(false)
    def ours = before.findAll { isOurs(it) }
    def earlier = ours.findAll { it.isLocked() }
    importObjectsFromFile(new File(folder, written ?: 'annotations.geojson').path)
    int imported = hierarchy.getAllObjects(false).size() - before.size()
    hierarchy.removeObjects(earlier, true)
    println "${name}: ${imported} objects imported, ${earlier.size()} earlier ones removed, " +
            "${ours.size() - earlier.size()} unlocked ones kept"
}

boolean isOurs(pathObject) {
    // cells have no name; asking them for metadata would make QuPath hold some for each
    return pathObject.getName() && pathObject.getMetadata()['software']?.startsWith('wsi_pipeline')
}
