// Run > Run for project: imports the polygons that came with this project.
// What it imported before is replaced; what was unlocked since, or drawn, stays.
import static qupath.lib.scripting.QP.*

def folder = buildFilePath(PROJECT_BASE_DIR, 'data', getProjectEntry().getID())
def earlier = getAllObjects(false).findAll {
    it.isLocked() && it.getName() && it.getMetadata()['software']?.startsWith('wsi_pipeline')
}
importObjectsFromFile(folder + '/annotations.geojson')
removeObjects(earlier, true)
